"""/tokenize, /detokenize and /tokenizer_info: ids of tokens as completions and chats read them, and back."""

from starlette.requests import Request

from infer.serve.behaviour import HIDDEN, hides
from infer.serve.chat import conversation
from infer.serve.endpoint import Endpoint
from infer.serve.errors import ApiError
from infer.serve.prompts import encode_text, off_loop
from infer.serve.served import Registry, Served
from infer.serve.settings import Settings
from infer.serve.types import ChatRequest, DetokenizeRequest, Text, TokenizeRequest, TokenizerInfo, Tokens
from model.errors import InputError


def routes(registry: Registry, settings: Settings) -> list[Endpoint]:
    """Return the endpoints of tokens."""

    async def tokenize(request: Request, body: TokenizeRequest) -> Tokens:
        served = registry.get(body.model)
        ids = await (_text(body, served) if body.messages is None else _conversation(body, served))
        names = None
        if body.return_token_strs:
            tokenizer = served.need_tokenizer("return_token_strs")
            names = await off_loop(len(ids), lambda: [tokenizer.token_name(token) for token in ids])
        return Tokens(len(ids), served.capacity, ids, names)

    async def detokenize(request: Request, body: DetokenizeRequest) -> Text:
        served = registry.get(body.model)
        tokenizer = served.need_tokenizer("tokens")
        try:
            text = await off_loop(len(body.tokens), tokenizer.decode, body.tokens)
        except InputError as error:
            raise ApiError(400, str(error), param="tokens") from error
        return Text(text, text)

    async def info(request: Request, body: None) -> TokenizerInfo:
        tokenizer = registry.get(request.query_params.get("model")).need_tokenizer("model")
        begin, end = (
            None if token is None else tokenizer.token_name(token) for token in (tokenizer.bos_id, tokenizer.eos_id)
        )
        return TokenizerInfo(begin, end, tokenizer.chat_template)

    return [
        Endpoint(
            "GET",
            "/tokenizer_info",
            info,
            "What the tokenizer puts around texts.",
            response=TokenizerInfo,
            query={"model": str},
            errors=(404,),
        ),
        Endpoint(
            "POST",
            "/tokenize",
            tokenize,
            "The tokens of a text or a conversation.",
            request=TokenizeRequest,
            response=Tokens,
            errors=(404,),
        ),
        Endpoint(
            "POST",
            "/detokenize",
            detokenize,
            "The text of tokens.",
            request=DetokenizeRequest,
            response=Text,
            errors=(404,),
        ),
    ]


async def _text(body: TokenizeRequest, served: Served) -> list[int]:
    text = _one_of(body, "prompt", "content")
    if text is None:
        raise ApiError(
            400, "there is nothing to tokenize; give prompt, content or messages", code="missing_required_parameter"
        )
    around = _one_of(body, "add_special_tokens", "add_special")
    if around is None and body.prompt is None:
        around = False  # llama-server's default
    served.need_tokenizer("prompt")
    try:
        return await off_loop(len(text), encode_text, served, text, around)
    except InputError as error:
        raise ApiError(400, str(error), param="prompt" if body.content is None else "content") from error


def _one_of(body: TokenizeRequest, name: str, other: str):
    """Return a field that has two names. Raises ApiError if they differ."""
    first, second = getattr(body, name), getattr(body, other)
    if None not in (first, second) and first != second:
        raise ApiError(400, f"{name} and {other} are two names of one field and differ; give one of them", param=other)
    return second if first is None else first


async def _conversation(body: TokenizeRequest, served: Served) -> list[int]:
    for name in ("prompt", "content"):
        if getattr(body, name) is not None:
            raise ApiError(400, f"messages and {name} exclude each other; give one of them", param=name)
    if served.behaviour is not None and served.behaviour.is_hidden:
        raise hides("messages", HIDDEN)
    shared = ("messages", "add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools")
    fields = {name: getattr(body, name) for name in shared}
    chat = ChatRequest(**fields, add_special_tokens=_one_of(body, "add_special_tokens", "add_special"))
    return (await conversation(chat, served))[1]
