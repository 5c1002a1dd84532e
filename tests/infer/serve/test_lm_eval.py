"""lm-evaluation-harness over HTTP gives the scores and texts that it gives in process.

`make peers` installs it; without it these tests are skipped.
"""

import shutil
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import uvicorn

pytest.importorskip("lm_eval")
pytest.importorskip("tenacity")
pytest.importorskip("aiohttp")
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

from experiments.evaluate.harness import HarnessModel
from infer.serve.app import create_app
from infer.serve.run import listen
from infer.serve.served import Registry, open_served
from model.convert import save_hf

pytestmark = pytest.mark.long

PAIRS = [
    (context, continuation)
    for context in ("the", "on the thin", "日本語", "a\nb", "x " * 30)
    for continuation in (" a", " the inner", "!", " é")
]


@pytest.fixture(scope="module")
def folder(tokenizer, model_config, random_params, tmp_path_factory):
    """The tiny model as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    save_hf(model_config, random_params(model_config, seed=1), folder)
    for file in tokenizer.path.parent.iterdir():
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def url(folder):
    """A server of the model in a thread."""
    with listen("127.0.0.1", 0) as listener, Registry([open_served(str(folder), slots=4, capacity=96)]) as registry:
        server = uvicorn.Server(uvicorn.Config(create_app(registry), log_level="warning"))
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def requests(arguments):
    return [SimpleNamespace(args=one) for one in arguments]


@pytest.mark.parametrize("batch_size", [1, 8])
def test_scores_are_those_in_process(url, folder, batch_size):
    expected = HarnessModel(folder).loglikelihood(requests(PAIRS))
    over_http = LocalCompletionsAPI(
        base_url=f"{url}/v1/completions", model="tiny", max_length=96, batch_size=batch_size
    )
    assert over_http.tokenizer_backend == "remote"
    found = over_http.loglikelihood(requests(PAIRS))
    np.testing.assert_allclose([one[0] for one in found], [one[0] for one in expected], rtol=0, atol=1e-4)
    assert [one[1] for one in found] == [one[1] for one in expected]


def test_rolling_scores_are_those_in_process(url, folder):
    texts = [("the thin " * 6,), ("日本語 on",)]
    expected = HarnessModel(folder).loglikelihood_rolling(requests(texts))
    over_http = LocalCompletionsAPI(base_url=f"{url}/v1/completions", model="tiny", max_length=97, batch_size=2)
    np.testing.assert_allclose(over_http.loglikelihood_rolling(requests(texts)), expected, rtol=0, atol=1e-4)


def test_texts_are_those_in_process(url, folder):
    settings = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    prompts = ["the", "on the thin", "a b"]
    in_process = HarnessModel(folder)
    expected = in_process.generate_until(requests([(prompt, dict(settings)) for prompt in prompts]))
    over_http = LocalCompletionsAPI(base_url=f"{url}/v1/completions", model="tiny", max_length=96, batch_size=3)
    assert over_http.generate_until(requests([(prompt, dict(settings)) for prompt in prompts])) == expected


def test_chats_are_those_in_process(url, folder):
    settings = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    chats = [[{"role": "user", "content": text}] for text in ("the", "on a")]
    in_process = HarnessModel(folder)
    over_http = LocalChatCompletion(
        base_url=f"{url}/v1/chat/completions", model="tiny", max_length=96, eos_string="<|im_end|>"
    )

    def texts(model):
        prompts = [model.apply_chat_template(chat) for chat in chats]
        return model.generate_until(requests([(prompt, dict(settings)) for prompt in prompts]))

    assert texts(over_http) == texts(in_process)
