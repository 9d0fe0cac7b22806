"""Options of whatever asks a model: which one, how it is loaded, and who judges its answers."""

from dataclasses import dataclass

from ..data.options import option


@dataclass
class ModelConfig:
    """Which model is asked, and how."""

    model: str = option(
        "", "folder or Hub name of a Q-Zoom checkpoint, or of a plain VLM, which then gets fresh branches"
    )
    revision: str | None = option(None, "revision of the model on the Hub")
    branch_layer: int | None = option(None, "layer K that the branches of a plain VLM read from")
    branch_depth: int = option(3, "number T of layers of each branch of a plain VLM")
    dtype: str = option(
        "auto", "auto (as stored), float32, bfloat16 or float16; weights in training are float32 in any case"
    )
    attn_implementation: str | None = option(None, "sdpa, flash_attention_2, …; the library's choice by default")
    load_in_4bit: bool = option(False, "load the frozen backbone in 4 bit (nf4); the branches stay as they are")
    min_tokens: int | None = option(
        None, "smallest coarse budget in merged visual tokens; the checkpoint's by default"
    )
    max_tokens: int | None = option(None, "largest coarse budget in merged visual tokens; the checkpoint's by default")
    prompt_suffix: str = option("", "text after every question, such as a request for a short answer")
    system_prompt: str | None = option(None, "system turn before the question")
    max_new_tokens: int = option(128, "longest answer the model may give, in tokens")


@dataclass
class JudgeConfig:
    """Who says whether an answer is right."""

    kind: str = option(
        "exact",
        "exact, anls, relaxed, contains (either answer holds the other), endpoint (an LLM at an OpenAI-compatible "
        "endpoint) or self (the VLM as a judge of text)",
    )
    threshold: float = option(0.5, "least ANLS that counts as right")
    base_url: str | None = option(None, "address of the endpoint")
    llm: str | None = option(None, "name of the model at the endpoint")
    api_key_variable: str = option("OPENAI_API_KEY", "environment variable that holds the key")
    concurrency: int = option(8, "requests at a time")
