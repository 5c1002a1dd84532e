"""Bodies of requests and responses: OpenAI's, with the extensions that vLLM's clients use.

A field that is None has its default. `refused`: see `infer.serve.endpoint.Endpoint`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from infer.sampling import MOST_LOGPROBS

MOST_CHOICES = 128
MOST_STOP_STRINGS = 64
LEAST_LOGPROB = -9999.0  # in place of −∞, which is not JSON

_Penalty = Annotated[float, Meta(ge=-2, le=2)]
_Fraction = Annotated[float, Meta(ge=0, le=1)]
_Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_Stop = Annotated[str, Meta(min_length=1, max_length=1000)]
_Ranked = Annotated[int, Meta(ge=0, le=MOST_LOGPROBS)]
TextOrIds = str | Annotated[list[str | _Count | Annotated[list[_Count], Meta(min_length=1)]], Meta(min_length=1)]
"""A text, texts, ids of tokens, or lists of ids."""

_REFUSED: dict[str, Any] = {
    "allowed_token_ids": [],
    "bad_words": [],
    "beam_width": 1,
    "guided_grammar": None,
    "guided_decoding_backend": None,
    "include_stop_str_in_output": False,
    "length_penalty": 1.0,
    "logits_processors": None,
    "priority": 0,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "truncate_prompt_tokens": None,
    "use_beam_search": False,
}


class StreamOptions(Struct, kw_only=True):
    """Options of a stream. include_usage: end with a chunk of the numbers of tokens."""

    include_usage: bool | None = None


class JsonSchema(Struct, kw_only=True):
    """A JSON schema with a name."""

    schema: dict[str, Any] | bool
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct, kw_only=True):
    """What the text must be: any text, a JSON object, JSON that meets a schema, or what matches a regular expression.

    schema: of a json_object, as llama-server takes it. pattern: of a regex.
    """

    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: JsonSchema | None = None
    schema: dict[str, Any] | None = None
    pattern: str | None = None


class StructuredOutputs(Struct, kw_only=True):
    """What the text must be, in vLLM's form: one of these.

    json: a schema, as an object or as its text. regex: a regular expression that the whole text matches. choice: one of
    these texts. json_object: any JSON object.
    """

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: Annotated[list[str], Meta(min_length=1)] | None = None
    json_object: bool | None = None
    grammar: Any = None
    structural_tag: Any = None
    whitespace_pattern: Any = None


class GenerationRequest(Struct, kw_only=True):
    """Fields that chat and completions have in common."""

    refused: ClassVar[Mapping[str, Any]] = _REFUSED

    model: str | None = None
    max_tokens: _Count | None = None
    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    n: Annotated[int, Meta(ge=1, le=MOST_CHOICES)] | None = None
    best_of: Annotated[int, Meta(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: _Stop | Annotated[list[_Stop], Meta(max_length=MOST_STOP_STRINGS)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: _Fraction | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    stop_token_ids: list[_Count] | None = None
    ignore_eos: bool | None = None
    min_tokens: _Count | None = None
    prompt_logprobs: _Ranked | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Meta(min_length=1)] | None = None
    structured_outputs: StructuredOutputs | None = None


class Part(Struct, kw_only=True):
    """A part of a message; only those of type "text" are supported."""

    type: str
    text: str | None = None


class Message(Struct, kw_only=True):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class ChatRequest(GenerationRequest, kw_only=True):
    """A conversation to answer.

    continue_final_message: continue the last message instead of answering it. chat_template_kwargs: further variables
    of the chat template.
    """

    refused: ClassVar[Mapping[str, Any]] = _REFUSED | {
        "audio": None,
        "chat_template": None,
        "documents": None,
        "echo": False,
        "function_call": None,
        "functions": None,
        "mm_processor_kwargs": None,
        "modalities": ["text"],
        "prediction": None,
        "reasoning_effort": None,
        "store": False,
        "web_search_options": None,
    }

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: _Count | None = None
    logprobs: bool | None = None
    top_logprobs: _Ranked | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(GenerationRequest, kw_only=True):
    """Prompts to continue: a text, texts, ids of tokens, or lists of ids. echo: begin the text with the prompt's."""

    refused: ClassVar[Mapping[str, Any]] = _REFUSED | {"suffix": None}

    prompt: TextOrIds
    echo: bool | None = None
    logprobs: _Ranked | None = None


class EmbeddingRequest(Struct, kw_only=True):
    """Texts to embed: a text, texts, ids of tokens, or lists of ids.

    dimensions: those of the model, or left out. encoding_format: "base64" is that of little-endian float32 numbers.
    """

    refused: ClassVar[Mapping[str, Any]] = {
        "chat_template": None,
        "messages": None,
        "normalize": True,
        "priority": 0,
        "truncate_prompt_tokens": None,
    }

    input: TextOrIds
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    user: str | None = None
    add_special_tokens: bool | None = None


class EmbeddingUsage(Struct):
    """Numbers of tokens of all texts."""

    prompt_tokens: int
    total_tokens: int


class Embedding(Struct):
    """The embedding of one text: numbers, or their base64."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingList(Struct):
    """Embeddings in the order of the texts."""

    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    object: Literal["list"] = "list"


class TokenizeRequest(Struct, kw_only=True):
    """A text or a conversation to tokenize, as `CompletionRequest` and `ChatRequest` have them.

    content, add_special: llama-server's names of prompt and add_special_tokens.
    """

    refused: ClassVar[Mapping[str, Any]] = {
        "chat_template": None,
        "mm_processor_kwargs": None,
        "parse_special": True,
        "with_pieces": False,
    }

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_special: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None


class Tokens(Struct):
    """Ids of tokens. max_model_len: most tokens of a prompt and its continuation together."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class TokenizerInfo(Struct):
    """What clients that encode texts themselves have to know; None: the tokenizer has none."""

    bos_token: str | None
    eos_token: str | None
    chat_template: str | None


class DetokenizeRequest(Struct, kw_only=True):
    """Ids of tokens."""

    tokens: list[_Count]
    model: str | None = None


class Text(Struct):
    """The text of tokens, under vLLM's name and under llama-server's."""

    prompt: str
    content: str


class TokenDetails(Struct):
    """cached_tokens: of the prompt, that the prefix cache held."""

    cached_tokens: int


class Usage(Struct):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: TokenDetails | None = None


class TopLogprob(Struct):
    """A token and its log-probability; bytes: None if the token has no text."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(Struct):
    """A token of the text with the most likely ones at its position."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    """Log-probabilities of the tokens of a message."""

    content: list[TokenLogprob]


class FunctionCall(Struct):
    """A call of a function; arguments: JSON."""

    arguments: str
    name: str | UnsetType = UNSET


class ToolCall(Struct):
    """A call of a tool."""

    function: FunctionCall
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    index: int | UnsetType = UNSET


class PromptLogprob(Struct):
    """A token at a position of the prompt; rank: 1 is the most likely, None beyond those that were requested."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]


class AnswerMessage(Struct):
    """The answer of the model."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(Struct):
    """One of n answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(Struct, kw_only=True):
    """Answers to a conversation."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Delta(Struct):
    """What a chunk adds to a message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChunkChoice(Struct):
    """What a chunk adds to one of n answers."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    token_ids: list[int] | UnsetType = UNSET

    @property
    def is_empty(self) -> bool:
        """True if the chunk adds nothing."""
        has_delta = self.delta.content or self.delta.tool_calls
        return not (has_delta or self.logprobs or self.finish_reason or self.token_ids)


class ChatChunk(Struct, kw_only=True):
    """A chunk of a stream of answers."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    system_fingerprint: str | None = None
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class CompletionLogprobs(Struct):
    """Log-probabilities of the tokens of a text; None for the first token of a prompt. text_offset: in characters."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(Struct):
    """One of n continuations of one of the prompts, or what a chunk of a stream adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length", "content_filter"] | None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET

    @property
    def is_empty(self) -> bool:
        """True if, as a chunk, it adds nothing."""
        has_tokens = self.token_ids or (self.logprobs is not None and self.logprobs.tokens)
        return not (self.text or self.finish_reason or has_tokens)


class Completion(Struct, kw_only=True):
    """Continuations of prompts, or a chunk of a stream of them."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str | None = None
    usage: Usage | UnsetType | None = UNSET


class ModelCard(Struct):
    """A model that is served; max_model_len: most tokens of a prompt and its continuation together."""

    id: str
    created: int
    max_model_len: int
    vocab_size: int
    object: Literal["model"] = "model"
    owned_by: str = "isoflop"
    root: str | None = None
    parent: None = None


class ModelList(Struct):
    """The models that are served."""

    data: list[ModelCard]
    object: Literal["list"] = "list"


class Health(Struct):
    """What a server that works answers."""

    status: Literal["ok"] = "ok"
