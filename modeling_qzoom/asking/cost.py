"""What answers cost: FLOPs of their prefill (`cost_qzoom`), from their reports and the lengths of their prompts."""

from ..cost_qzoom import PrefillCost, Prompt
from .answers import Answer


def answer_flops(cost: PrefillCost, answer: Answer) -> int:
    """FLOPs of the prefill that gave an answer.

    Args:
        cost: the cost under the options that the answer was given under.
        answer: the answer.
    """
    prompt = Prompt(answer.prompt_tokens, answer.suffix_tokens, answer.grid)
    return cost.of_report(prompt, answer.report)
