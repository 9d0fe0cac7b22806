"""The server on Ray Serve, in processes of its own: load, a killed replica, clients that leave, and the end."""

from pathlib import Path

import openai
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from hub_release.measure.serving.faults import (
    ended_while_it_answers,
    memory_over,
    with_a_killed_replica,
    with_clients_that_leave,
)
from hub_release.measure.serving.load import load
from hub_release.measure.serving.questions import Asked, body_of, mixed_questions
from hub_release.measure.serving.server import running
from hub_release.measure.serving.throughput import talkative
from modeling_qzoom.serving import __main__ as command
from modeling_qzoom.serving import deployment
from modeling_qzoom.serving.config import ServeConfig
from tests.release_fixtures import DEMO


FLAGS = ("--dtype", "float32", "--gpus", "0")


def test_the_yaml_names_what_is_there() -> None:
    content = yaml.safe_load(Path(deployment.__file__).with_name("serve.yaml").read_text())
    application = ServeDeploySchema.model_validate(content).applications[0]
    assert application.import_path == f"{deployment.__name__}:{deployment.build_app.__name__}"
    assert {entry.name for entry in application.deployments} == {deployment.HTTP, deployment.MODEL}
    config = ServeConfig(**application.args)
    model = next(entry for entry in application.deployments if entry.name == deployment.MODEL)
    assert model.max_ongoing_requests == deployment.most_requests(config)


def test_the_command_says_what_is_wrong(capsys) -> None:
    for arguments, status, said in (
        (["x", "--batch-rows", "0"], 2, "--batch-rows: Input should be greater than or equal to 1, got '0'"),
        (["x", "--in-process", "--replicas", "2"], 1, "--in-process is one model"),
        (["x", "--api-key-variable", "QZOOM_NO_SUCH_KEY"], 1, "names QZOOM_NO_SUCH_KEY, which is not set"),
    ):
        assert command.main(arguments) == status
        assert said in capsys.readouterr().err


@pytest.mark.slow
def test_load_and_a_killed_replica() -> None:
    """No answer is lost, doubled or another's; what the killed one had begun to stream fails loudly."""
    asked = mixed_questions(DEMO, 24)
    with running(DEMO, *FLAGS, "--replicas", "2") as server:
        outcome = load(server.address, asked * 4, 32, stream_every=4)
        assert (outcome.right, outcome.wrong, outcome.failed) == (96, 0, []) and len(outcome.ids) == 96

        official = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="zoom must be one of"):
            body = {**asked[0].body, "extra_body": {"zoom": {"zoom": "x"}}}
            official.chat.completions.create(**{name: body[name] for name in body if name != "zoom"})

        told = with_a_killed_replica(server, asked * 4, 32)
        assert told["wrong"] == told["lost"] == told["doubled"] == 0 and told["killed"] == 1
        assert told["right"] + told["failed"] == 96 and told["failed"] <= 16  # streams of the killed one, loudly
        assert told["replicas_afterwards"] == 2


@pytest.mark.slow
def test_clients_that_leave_and_the_end_of_a_server(tmp_path) -> None:
    """Places are free again at once; on SIGTERM what was accepted is answered, and the server ends in order."""
    body = {**body_of(DEMO.name, "hello", None, temperature=2.0, n=2), "max_tokens": 400}
    with running(talkative(DEMO, tmp_path, 400), *FLAGS, "--replicas", "2") as server:
        told = with_clients_that_leave(server, body, 6)
        assert told["places_still_taken"] == 0 and told["seconds_until_free"] < 5
        told = ended_while_it_answers(server, [Asked({**body, "seed": seed}) for seed in range(6)], 6)
        assert told["right"] == 6 and told["exit_status"] == 0


@pytest.mark.slow
def test_memory_stays_flat() -> None:
    """2,000 small requests to one model."""
    asked = mixed_questions(DEMO, 16, side=160)
    with running(DEMO, *FLAGS, "--in-process") as server:
        told = memory_over(server, asked, 2000, 32)
    assert told["right"] == 2000 and told["mib_grown_since_second"] < 40, told
