"""Options of whatever asks a model: which one, how it is loaded, and who judges its answers."""

from dataclasses import dataclass


@dataclass
class ModelConfig:
    """What every stage says about the model.

    Args:
        model: Folder or Hub name of a Q-Zoom checkpoint, or of a plain VLM, which then gets fresh branches.
        revision: Its revision on the Hub.
        branch_layer: K, for a plain VLM.
        branch_depth: T, for a plain VLM.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16". Trained weights are float32 in any case.
        attn_implementation: "sdpa", "flash_attention_2", …; the library's choice by default.
        load_in_4bit: Load the frozen backbone in 4 bit (nf4); the branches stay as they are.
        min_tokens, max_tokens: Coarse budget in merged visual tokens; the checkpoint's by default.
        prompt_suffix: Appended to every question, such as a request for a short answer.
        system_prompt: System turn before it.
        max_new_tokens: Longest answer the model may give.
    """

    model: str = ""
    revision: str | None = None
    branch_layer: int | None = None
    branch_depth: int = 3
    dtype: str = "auto"
    attn_implementation: str | None = None
    load_in_4bit: bool = False
    min_tokens: int | None = None
    max_tokens: int | None = None
    prompt_suffix: str = ""
    system_prompt: str | None = None
    max_new_tokens: int = 128


@dataclass
class JudgeConfig:
    """Who says whether an answer is right.

    Args:
        kind: "exact", "anls", "relaxed", "contains" (either answer holds the other), "endpoint" (an LLM behind an
            OpenAI-compatible endpoint) or "self" (the VLM as a judge of text).
        threshold: Least ANLS that counts as right.
        base_url: The endpoint.
        llm: Name of the model there.
        api_key_variable: Environment variable that holds the key.
        concurrency: Requests at a time.
    """

    kind: str = "exact"
    threshold: float = 0.5
    base_url: str | None = None
    llm: str | None = None
    api_key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 8
