"""Who says whether an answer is right: a metric, an LLM behind an endpoint, or the VLM itself as a judge of text."""

import os
import re
import time
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError, InferenceTimeoutError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx

from .config import JudgeConfig
from .metrics import anls, exact_match, relaxed_match
from .session import Session


Truths = tuple[str, ...]
Metric = Callable[[str, Truths], bool]

ATTEMPTS = 4
# seconds before the second attempt; every further pause is twice as long
FIRST_PAUSE = 1.0
_SECONDS = 120
_VERDICT_TOKENS = 1024  # a model that thinks first needs room
_BUSY = (408, 409, 425, 429)
_SELF_BATCH = 16

INSTRUCTIONS = (
    "You grade short answers to questions about a picture that you cannot see. You are given the question, one or "
    "more accepted answers, and the answer of a model. Compare meaning, not wording."
)
RULES = (
    "The model's answer counts as correct when one of these holds:\n"
    "1. It states an accepted answer, alone or inside a longer sentence.\n"
    "2. It says the same in other words: a synonym, an abbreviation, a more exact form.\n"
    "3. It differs from an accepted answer only in form: capitals, punctuation, units written out, 1,000 for 1000, "
    "another way to write a date.\n"
    "It counts as wrong when it contradicts the accepted answers, names several candidates of which only one fits, "
    "leaves out what the question asks for, or gives no answer."
)


class Judge(Protocol):
    """Whoever decides whether answers are right."""

    def judge(self, questions: Sequence[str], truths: Sequence[Truths], answers: Sequence[str]) -> list[bool]:
        """Whether each answer is right.

        Args:
            questions: the questions.
            truths: accepted answers to each, at least one.
            answers: the answer to each; an empty one is never right.

        Raises:
            ValueError: the judge cannot decide; says why.
        """
        ...


def normalize(text: str) -> str:
    """Lower case without punctuation, with single spaces; 1,000 becomes 1000, and 3.5 stays."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))|['’]", "", text.lower())
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", " ", text)
    kept = (letter if letter == "." or unicodedata.category(letter)[0] not in "PS" else " " for letter in text)
    return " ".join("".join(kept).split())


def _holds(text: str, part: str) -> bool:
    """Whether `part` stands in `text`, not as a piece of a longer word or number."""
    return re.search(rf"(?<![0-9a-z])(?<!\d\.){re.escape(part)}(?!\.?[0-9a-z])", text) is not None


def contains_match(answer: str, truths: Truths) -> bool:
    """Whether the answer holds a truth or a truth the answer, both normalised; one without a letter holds nothing."""
    given = normalize(answer)
    normalized = [normalize(truth) for truth in truths]
    return any(given and truth and (_holds(given, truth) or _holds(truth, given)) for truth in normalized)


@dataclass(frozen=True)
class MetricJudge:
    """A judge that applies a metric.

    Args:
        metric: rule from an answer and its truths to a verdict.
    """

    metric: Metric

    def judge(self, questions: Sequence[str], truths: Sequence[Truths], answers: Sequence[str]) -> list[bool]:
        """As `Judge.judge`."""
        return [
            bool(answer.strip()) and self.metric(answer, accepted)
            for _, accepted, answer in zip(questions, truths, answers, strict=True)
        ]


def judge_messages(question: str, truths: Truths, answer: str) -> list[dict[str, str]]:
    """The chat that asks a language model for a verdict."""
    accepted = "\n".join(f"- {truth}" for truth in truths)
    case = f"Question: {question}\nAccepted answers:\n{accepted}\nAnswer of the model: {answer}"
    ask = "Is the answer of the model correct? Reply with one word, Yes or No."
    return [
        {"role": "system", "content": INSTRUCTIONS},
        {"role": "user", "content": f"{RULES}\n\n{case}\n\n{ask}"},
    ]


def parse_verdict(text: str) -> bool | None:
    """A reply as a verdict; None for anything but a Yes or No at its beginning, thoughts aside."""
    spoken = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL)
    word = re.match(r"\W*(yes|no)\b", spoken, flags=re.IGNORECASE)
    return None if word is None else word.group(1).lower() == "yes"


def _line(error: Exception) -> str:
    """An error's text in one line that ends with a full stop."""
    return " ".join(str(error).split()).rstrip(".") + "."


class EndpointJudge:
    """An LLM behind an OpenAI-compatible endpoint.

    Args:
        config: Its `base_url`, `llm`, `api_key_variable` and `concurrency`.

    Raises:
        ValueError: `base_url` or `llm` is missing.
    """

    def __init__(self, config: JudgeConfig) -> None:
        if not config.base_url or not config.llm:
            raise ValueError(
                "judge.kind=endpoint needs judge.base_url (such as http://localhost:8000/v1) and judge.llm, the name "
                "of the model there."
            )
        if config.concurrency < 1:
            raise ValueError(f"judge.concurrency must be at least 1, got {config.concurrency}.")
        self.config = config
        # without a key the client would send the user's Hub token to whoever runs the endpoint
        key = os.environ.get(config.api_key_variable) or "none"
        self.client = InferenceClient(base_url=config.base_url, api_key=key, timeout=_SECONDS)

    def judge(self, questions: Sequence[str], truths: Sequence[Truths], answers: Sequence[str]) -> list[bool]:
        """As `Judge.judge`; transport errors and unclear verdicts are tried again."""
        rows = list(zip(questions, truths, answers, strict=True))
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            return list(pool.map(lambda row: bool(row[2].strip()) and self._verdict(*row), rows))

    def _verdict(self, question: str, truths: Truths, answer: str) -> bool:
        trouble = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(FIRST_PAUSE * 2 ** (attempt - 1))
            try:
                reply = self._ask(question, truths, answer)
            except OfflineModeIsEnabled as error:
                raise ValueError(f"{self._name}: HF_HUB_OFFLINE forbids every request; unset it.") from error
            except HfHubHTTPError as error:
                status = error.response.status_code
                if status < 500 and status not in _BUSY:
                    raise ValueError(
                        f"{self._name} refuses requests: {_line(error)} Check judge.base_url, judge.llm and the key "
                        f"in the environment variable {self.config.api_key_variable}."
                    ) from error
                trouble = f"is not available: {_line(error)} Run the stage again once it is"
            except (InferenceTimeoutError, httpx.TransportError) as error:
                trouble = f"cannot be reached: {_line(error)} Run the stage again once it is up"
            else:
                verdict = parse_verdict(reply)
                if verdict is not None:
                    return verdict
                trouble = (
                    f"gave no verdict on {answer!r} as an answer to {question!r} but {reply[:200]!r}. Give a "
                    "judge.llm that follows instructions, or a metric as judge.kind"
                )
        raise ValueError(f"{self._name} {trouble}.")

    @property
    def _name(self) -> str:
        return f"The judge {self.config.llm!r} at {self.config.base_url}"

    def _ask(self, question: str, truths: Truths, answer: str) -> str:
        output = self.client.chat_completion(
            judge_messages(question, truths, answer),
            model=self.config.llm,
            temperature=0.0,
            max_tokens=_VERDICT_TOKENS,
        )
        return output.choices[0].message.content or ""


class SelfJudge:
    """The VLM as a judge of text: whether Yes or No is the likelier first token of its reply.

    Args:
        session: the VLM; it sees no image.

    Raises:
        ValueError: its tokenizer spells Yes and No alike.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        yes, no = (self._first_tokens(word) for word in ("Yes", "No"))
        self._yes, self._no = (sorted(ids) for ids in (yes - no, no - yes))
        if not self._yes or not self._no:
            raise ValueError("judge.kind=self needs a tokenizer that knows the words Yes and No; take another judge.")

    def _first_tokens(self, word: str) -> set[int]:
        tokenizer = self.session.processor.tokenizer
        spellings = [space + form for space in ("", " ") for form in (word, word.lower(), word.upper())]
        first = {tokenizer(text, add_special_tokens=False).input_ids[0] for text in spellings}
        return first - {tokenizer.unk_token_id}

    @torch.no_grad()
    def judge(self, questions: Sequence[str], truths: Sequence[Truths], answers: Sequence[str]) -> list[bool]:
        """As `Judge.judge`."""
        rows = list(zip(questions, truths, answers, strict=True))
        verdicts: list[bool] = []
        for start in range(0, len(rows), _SELF_BATCH):
            verdicts += self._judge_batch(rows[start : start + _SELF_BATCH])
        return [verdict and bool(answer.strip()) for verdict, answer in zip(verdicts, answers)]

    def _judge_batch(self, rows: list[tuple[str, Truths, str]]) -> list[bool]:
        processor = self.session.processor
        chats: list[list[dict[str, Any]]] = [
            [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in judge_messages(*row)]
            for row in rows
        ]
        texts = [processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
        inputs = dict(processor(text=texts, return_tensors="pt"))
        inputs = {name: inputs[name].to(self.session.device) for name in ("input_ids", "attention_mask")}
        output = self.session.model.generate(
            **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        scores = output.logits[0].float()  # (B, vocabulary)
        return (scores[:, self._yes].amax(1) > scores[:, self._no].amax(1)).tolist()


def judge_for(config: JudgeConfig, session: Session) -> Judge:
    """The judge of a configuration.

    Args:
        config: which judge, and its settings.
        session: the model, for `kind="self"`.

    Raises:
        ValueError: an unknown kind, or one whose settings are incomplete.
    """
    if config.kind == "endpoint":
        return EndpointJudge(config)
    if config.kind == "self":
        return SelfJudge(session)
    metrics: dict[str, Metric] = {
        "exact": exact_match,
        "anls": lambda answer, truths: anls(answer, truths, threshold=0.0) >= config.threshold,
        "relaxed": relaxed_match,
        "contains": contains_match,
    }
    if config.kind not in metrics:
        raise ValueError(f"judge.kind must be one of {[*metrics, 'endpoint', 'self']}, got {config.kind!r}.")
    if not 0 < config.threshold <= 1:
        raise ValueError(f"judge.threshold must lie in (0, 1], got {config.threshold}.")
    return MetricJudge(metrics[config.kind])
