"""The table of a mixer's axes, and the surgery that follows from it, against what the tensors themselves say."""

import copy

import pytest
import torch

from ssmc.runtime.models.architectures.plan import CHANNEL, HEAD, MODEL, RANK, STATE, Plan
from ssmc.runtime.models.families import architecture_for
from tests.support.families import FAMILIES
from tests.support.models import random_mamba2, random_model, random_tokens

MODELS = {"mamba": random_model, "mamba2": random_mamba2, **FAMILIES}


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    return architecture_for(request.param), MODELS[request.param]()


def mixers(architecture, model):
    found = [architecture.mixer(block) for block in architecture.blocks(model)]
    return [mixer for mixer in found if mixer is not None]


def test_every_tensor_of_a_mixer_is_in_the_table_and_the_sizes_are_those_of_the_configuration(case):
    architecture, model = case
    sizes = architecture.dimensions(model.config)
    wanted = {MODEL: sizes.d_model, CHANNEL: sizes.d_inner, STATE: sizes.groups * sizes.d_state}
    wanted |= {HEAD: sizes.heads} if sizes.heads else {RANK: sizes.dt_rank}
    for mixer in mixers(architecture, model):
        shapes = {name: tensor.shape for name, tensor in mixer.named_parameters()}
        assert shapes.keys() <= architecture.plan.tensors.keys()
        assert architecture.plan.sizes(shapes) == wanted
        assert {name: len(axes) for name, axes in architecture.plan.tensors.items() if name in shapes} == {
            name: len(shape) for name, shape in shapes.items()
        }


@torch.no_grad()
def test_masked_states_are_cut_out_of_every_layer_and_nothing_changes(case):
    """The oracle is the stock model: with half of the states masked, and of half as many states."""
    architecture, model = case
    masked, sizes = copy.deepcopy(model), architecture.dimensions(model.config)
    n, groups = sizes.d_state, sizes.groups
    kept = [n * group + state for group in range(groups) for state in range(1, n, 2)]
    for mixer in mixers(architecture, masked):
        assert not architecture.is_masked(mixer, STATE, kept)
        architecture.mask_states(mixer, kept)
        assert architecture.is_masked(mixer, STATE, kept)
        assert not architecture.is_masked(mixer, STATE, kept[1:])
    layers = [kept] * sizes.n_layer
    tensors, config, cuts = architecture.cut(masked.state_dict(), masked.config, STATE, layers)
    assert architecture.dimensions(config).d_state == n // 2
    assert all(cut.before != cut.after for cut in cuts)
    smaller = type(model)(config).eval()
    smaller.load_state_dict(tensors)
    tokens = random_tokens()
    wanted = masked(tokens).logits
    assert float((smaller(tokens).logits - wanted).abs().max() / wanted.abs().max()) < 3e-5


def test_what_narrow_takes_widen_writes_back():
    """Only what stays is touched by work on the narrow block."""
    architecture, model = architecture_for("mamba"), random_model()
    block, kept = model.backbone.layers[0], [0, 3, 4, 17]
    before = copy.deepcopy(block)
    narrow = architecture.narrow(block, CHANNEL, kept)
    assert narrow.mixer.A_log.shape == (4, before.mixer.A_log.shape[1])
    assert torch.equal(narrow.mixer.in_proj.weight[4:], before.mixer.in_proj.weight[-48:][kept])
    with torch.no_grad():
        narrow.mixer.out_proj.weight += 1
    architecture.widen(block, narrow, CHANNEL, kept)
    assert torch.equal(block.mixer.out_proj.weight[:, kept], before.mixer.out_proj.weight[:, kept] + 1)
    assert torch.equal(block.mixer.D[kept], before.mixer.D[kept])
    assert architecture.is_masked(block.mixer, CHANNEL, kept)
    assert float(block.mixer.in_proj.weight.abs().sum(1).count_nonzero()) == 2 * len(kept)
    assert torch.equal(block.mixer.A_log, before.mixer.A_log)


def test_a_table_of_a_family_of_ones_own():
    """Dimensions are whatever a table names: here groups of attention, which keys and queries share."""
    plan = Plan(
        {"q.weight": (("query",), (MODEL,)), "kv.weight": (("key", "key"), (MODEL,)), "o": ((), ("query",))}, {}
    )
    shapes = {"q.weight": (6, 5), "kv.weight": (8, 5), "o": (5, 6)}
    sizes = plan.sizes(shapes)
    assert sizes == {"query": 6, MODEL: 5, "key": 4}
    places = plan.kept(shapes, sizes, {"key": torch.tensor([1, 2])}, "key")
    assert [(p.name, p.axis, p.index.tolist()) for p in places] == [("kv.weight", 0, [1, 2, 5, 6])]
    both = plan.own(shapes, sizes, {MODEL: torch.tensor([4])})
    assert [(p.name, p.axis, p.index.tolist()) for p in both] == [("q.weight", 1, [4]), ("kv.weight", 1, [4])]
    with pytest.raises(ValueError, match="an axis of 7 does not hold key \\+ key"):
        plan.sizes(shapes | {"kv.weight": (7, 5)})
