"""The router's training pass: the logits of `generate`, whatever the padding, and nothing above the router's layer."""

import pytest
import torch
import torch.nn.functional as F

from modeling_qzoom import QZoomForConditionalGeneration
from tests.invariants.test_visor import CHOICES, ROUTED, families, routed_model
from tests.tiny import make_inputs, plain_inputs, tiny_model
from tests.training.test_forward_training import right_padded


@pytest.fixture(scope="module")
def qwen() -> tuple[QZoomForConditionalGeneration, dict]:
    return routed_model("qwen2_5_vl"), plain_inputs(make_inputs("qwen2_5_vl", ROUTED))


@families
def test_it_asks_as_generate_does(family):
    model, inputs = routed_model(family), make_inputs(family, ROUTED)
    options = {"zoom": "never", "vision": "auto", "return_zoom_reports": True, "return_dict_in_generate": True}
    chosen = [report.vision for report in model.generate(**inputs, max_new_tokens=1, **options).zoom_reports]
    targets = torch.tensor([0, 1, 2, -100, 1, 0, 2])
    with torch.no_grad():
        output = model(**plain_inputs(inputs), route_targets=targets)
        again = model(**right_padded(plain_inputs(inputs)), route_targets=targets)
    assert [CHOICES[place] for place in output.route_logits.argmax(-1).tolist()] == chosen
    torch.testing.assert_close(output.route_loss, F.cross_entropy(output.route_logits, targets))
    assert output.logits is None and torch.equal(output.loss, output.route_loss)
    torch.testing.assert_close(again.route_logits, output.route_logits, atol=1e-4, rtol=0)


def test_layers_above_the_router_do_not_run(qwen):
    model, inputs = qwen
    ran = []
    hooks = [
        layer.register_forward_hook(lambda *args, place=place: ran.append(place))
        for place, layer in enumerate(model.vlm.get_decoder().layers)
    ]
    model(**inputs, route_targets=torch.zeros(len(ROUTED), dtype=torch.long))
    for hook in hooks:
        hook.remove()
    assert ran == [0]


def test_rows_without_a_target_give_a_gradient_of_zero(qwen):
    model, inputs = qwen
    model.zero_grad()
    loss = model(**inputs, route_targets=torch.full((len(ROUTED),), -100)).loss
    loss.backward()
    assert loss.item() == 0 and all(not weight.grad.any() for weight in model.visor.parameters())
    model.zero_grad()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"route_targets": torch.tensor([0, 1])}, "one number per row"),
        ({"route_targets": torch.tensor([0, 1, 2, 3, 0, 0, 0])}, "places of the router's 3 choices"),
        ({"route_targets": torch.zeros(7)}, "whole numbers"),
        ({"labels": torch.zeros(1)}, r"leave \['labels'\] out"),
        ({"vision": "upper", "gate_targets": torch.zeros(7)}, r"leave \['gate_targets', 'vision'\] out"),
        ({"use_cache": True}, "does not take \\['use_cache'\\]"),
    ],
)
def test_what_does_not_fit_is_named(qwen, options, message):
    model, inputs = qwen
    with pytest.raises(ValueError, match=message):
        model(**inputs, **{"route_targets": torch.zeros(7, dtype=torch.long), **options})


def test_a_model_without_a_router():
    inputs = plain_inputs(make_inputs("qwen2_5_vl", ROUTED))
    with pytest.raises(ValueError, match="this model has no router"):
        tiny_model("qwen2_5_vl")(**inputs, route_targets=torch.zeros(7, dtype=torch.long))
    with pytest.raises(ValueError, match="is it a misspelt 'route_targets'"):
        tiny_model("qwen2_5_vl")(**inputs, route_target=torch.zeros(7, dtype=torch.long))
