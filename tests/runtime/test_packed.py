"""Documents packed into one row: in every form each must read as if it were alone."""

import pytest
import torch
from families import AUGMENTED, SMALL, swap, swapped, tiny_model
from linearize_kernels import chunked

from linearize_cli.conversion.document_check import check_document_masking
from linearize_cli.errors import UserError
from linearize_cli.methods.recipe import Distill, Lora
from linearize_cli.methods.registry import load_recipe
from linearize_cli.models.batch import IGNORED, Blocks, causal_batch, document_positions
from linearize_cli.runtime import dispatch
from linearize_cli.runtime import layer as layer_module
from linearize_cli.runtime.dispatch import attention_implementation
from linearize_cli.runtime.packed import attend_apart, attend_packed, document_starts
from linearize_cli.training.attention_transfer import transferring
from linearize_cli.training.distillation import Distillation
from linearize_cli.training.student import add_lora

# Two rows of as many tokens: shorter and longer than the window of 8, alone in their size and not.
ROWS = ([1, 37, 5, 70, 3, 29], [145])
SLOW = pytest.mark.slow
CUT = ("attention.conv.width=4",)
NEAR = ("attention.local.size=8", *CUT)
METHODS = {
    "augmented": (*NEAR, "attention.far.feature_dim=8"),
    "augmented:flash": NEAR,
    "augmented:retention": NEAR,
    "gated-delta": CUT,
    "linformer": CUT,
    "mamba2": CUT,
    "gla": CUT,
    "kda": CUT,
    "lightning": CUT,
    "window": NEAR,
}


def attention(method):
    return load_recipe(method, METHODS[method]).to_dict()["attention"]


def packed(rows=ROWS):
    """Blocks, and each document's ids `[1, n]`, row by row."""
    torch.manual_seed(2)
    ids = torch.randint(3, SMALL["vocab_size"], (len(rows), sum(rows[0])))
    starts = torch.zeros_like(ids, dtype=torch.bool)
    for row, lengths in zip(starts, rows, strict=True):
        row[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
    documents = [part[None] for row, own in zip(ids, rows, strict=True) for part in row.split(own)]
    return Blocks(ids, starts), documents


def logits(model, blocks):
    with torch.no_grad():
        return model(**causal_batch(blocks).inputs).logits.flatten(0, 1)


def apart(model, blocks, documents):
    """The largest difference between packed documents and each by itself."""
    alone = torch.cat([logits(model, document) for document in documents])
    return (logits(model, blocks) - alone).abs().max().item()


def double(family, *args, **changes):
    return swapped(family, *args, **changes).double()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_documents_apart(method):
    blocks, documents = packed()
    model = double("llama", attention(method))
    assert apart(model, blocks, documents) < 1e-11
    joined = Blocks(blocks.ids, torch.zeros_like(blocks.starts))
    assert (logits(model, joined) - logits(model, blocks)).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "mistral", "gemma2", "gemma3n"])
@pytest.mark.parametrize("keep", [0, 2])
def test_every_kind_of_model_keeps_documents_apart(family, keep):
    blocks, documents = packed()
    model, native = double(family, keep=keep), tiny_model(family).config._attn_implementation
    softmax = 1e-5 if native == "eager" else 1e-11  # eager softmax is fp32 whatever the model is
    assert apart(model, blocks, documents) < (softmax if keep else 1e-11)
    with attention_implementation(model, native):
        assert apart(model, blocks, documents) < softmax


def test_one_row_of_positions_serves_all():
    model, ids = double("llama"), packed()[0].ids[:, :40]
    positions = torch.cat([torch.arange(13), torch.arange(27)])[None]
    with torch.no_grad():
        actual = model(ids, position_ids=positions, use_cache=False).logits
        first, second = (model(part, use_cache=False).logits for part in (ids[:, :13], ids[:, 13:]))
    torch.testing.assert_close(actual, torch.cat([first, second], 1))


def test_pads_and_a_cache_are_no_documents():
    """Check that positions separate no documents there, as in transformers."""
    model, ids = double("llama"), packed()[0].ids[:, :20]
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(padded[0, 6:], model(ids[:1, 6:], use_cache=False).logits[0])
        restart = torch.arange(20).remainder(10)[None]
        cached = model(ids, position_ids=restart, use_cache=True).logits
        without = model(ids, position_ids=restart, use_cache=False).logits
    assert (cached - without).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("keep", "inner"), [(0, False), pytest.param(1, False, marks=SLOW), pytest.param(0, True, marks=SLOW)]
)
def test_compiled_documents_are_apart(keep, inner):
    """By positions and by a mask, before and after rows of one document."""
    model, ids = swapped("llama", keep=keep, num_hidden_layers=1 + keep), packed()[0].ids[:, :20]
    module = model.model if inner else model
    positions = torch.stack([torch.arange(20) % 7, torch.arange(20)])
    number = (positions == 0).cumsum(-1)[:, None]
    mask = (number[..., None] == number[:, :, None]).tril()
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager")
    for given in ({"position_ids": positions}, {}, {"position_ids": positions, "attention_mask": mask}):
        with torch.no_grad():
            expected = module(ids, use_cache=False, **given)[0]
            torch.testing.assert_close(compiled(ids, use_cache=False, **given)[0], expected)


def test_positions_that_pack_nothing():
    assert document_starts(None) is None
    assert document_starts(torch.arange(5, 11)[None]) is None
    assert document_starts(torch.zeros(3, 2, 7)) is None
    starts = document_starts(torch.tensor([[0, 1, 0, 0, 1], [0, 1, 2, 0, 1]]))
    assert starts.tolist() == [[True, False, True, True, False], [True, False, False, True, False]]
    assert torch.equal(document_starts(document_positions(starts)), starts)


def test_documents_are_batched_by_length():
    """Every token once, and few pads: no document is beside one much longer."""
    lengths, sizes = [7, 300, 64, 127, 1, 128, 17, 260], []
    starts = torch.zeros(1, sum(lengths), dtype=torch.bool)
    starts[0, torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
    q, k, v = torch.randn(3, 1, 2, sum(lengths), 5).unbind()

    def attend(q, k, v, valid):
        sizes.append(q.shape[0] * q.shape[2])
        return (q * k).cumsum(-2) + v

    expected = [
        (a * b).cumsum(-2) + c for a, b, c in zip(*(x.split(lengths, 2) for x in (q, k, v)), strict=True)
    ]
    torch.testing.assert_close(attend_apart(attend, starts, None, q, k, v), torch.cat(expected, 2))
    assert sizes == [3 * 17, 2 * 127, 128, 2 * 300]


def test_packed_documents_lie_as_they_did():
    """Rows behind one another, and back."""
    starts = torch.zeros(2, 9, dtype=torch.bool)
    starts[:, 0] = starts[0, 4] = starts[1, 7] = True
    model = double("llama", attention("augmented"))
    layer = model.model.layers[0].self_attn.linear_attention
    eq = layer.equation
    q, k, v = (torch.randn(2, n, 9, eq.key_dim).double() for n in (eq.heads, eq.kv_heads, eq.kv_heads))
    expected = attend_apart(lambda *heads: chunked(layer, None, *heads)[0], starts, None, q, k, v)
    torch.testing.assert_close(attend_packed(layer, starts, q, k, v), expected)


@pytest.mark.parametrize("can", [True, False])
def test_documents_go_where_they_can(can, monkeypatch):
    """To `varlen` as they are, if kernels run; the answer is the same."""
    blocks, documents = packed()
    model, went = double("llama", attention("augmented")), []

    def spy(name):
        own = getattr(layer_module, name)
        monkeypatch.setattr(layer_module, name, lambda *given: went.append(name) or own(*given))

    monkeypatch.setattr(layer_module, "packed_plan", lambda *given: can or None)
    for name in ("attend_packed", "attend_apart"):
        spy(name)
    assert apart(model, blocks, documents) < 1e-11
    assert set(went) == {"attend_packed" if can else "attend_apart"}


def test_no_answer_lies_across_a_boundary():
    ids = torch.arange(10, 17)[None]
    starts = torch.tensor([[False, False, True, True, False, False, True]])
    batch = causal_batch(Blocks(ids, starts))
    assert batch.labels.tolist() == [[11, IGNORED, IGNORED, 14, 15, IGNORED, IGNORED]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 0, 0, 1, 2, 0]]
    assert batch.counted is None


def test_blocks_are_cut_by_rows():
    blocks, _ = packed()
    part = blocks[1:2].to("cpu")
    assert len(part) == 1 and part.numel() == 145 and part.counted is None
    assert torch.equal(part.ids, blocks.ids[1:]) and torch.equal(part.starts, blocks.starts[1:])


def test_transfer_learns_each_document_from_its_own_softmax():
    """A document three times in a row has the losses that it has alone."""
    model = tiny_model("llama")
    native = model.config._attn_implementation
    swap(model, AUGMENTED)
    model.double()
    _, (document,) = packed(([29],))
    starts = torch.zeros(1, 29, dtype=torch.bool).index_fill(1, torch.tensor([0]), True)
    losses = []
    for blocks in (Blocks(document), Blocks(document.repeat(1, 3), starts.repeat(1, 3))):
        with transferring(model, native) as found:
            model(**causal_batch(blocks).inputs)
            losses.append(torch.stack(list(found.values())))
            losses[-1].sum().backward()
        losses.append(
            torch.cat(
                [p.grad.flatten() for p in model.model.layers[0].self_attn.linear_attention.parameters()]
            )
        )
        model.zero_grad()
    torch.testing.assert_close(losses[0], losses[2])
    torch.testing.assert_close(losses[1], losses[3])


@pytest.mark.parametrize("weights", [Distill(kl=1.0), Distill(kl=0.0, ce=1.0)])
def test_distillation_of_packed_documents_is_that_of_each(weights):
    model = tiny_model("llama")
    native = model.config._attn_implementation
    swap(model, AUGMENTED, keep=1)
    student = add_lora(model.requires_grad_(False), Lora()).double()
    blocks, documents = packed(([11, 1, 20, 37], [30, 33, 5, 1]))
    trained = [p for p in student.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.1 * torch.randn_like(parameter))

    def result(blocks):
        loss = Distillation(student, native, weights)(causal_batch(blocks))[0]
        grads = torch.autograd.grad(
            loss, trained, materialize_grads=True
        )  # nothing is far in a short document
        return torch.cat([loss[None], *(g.flatten() for g in grads)])

    answers = [document.numel() - (weights.ce > 0) for document in documents]
    expected = sum(n * result(document) for n, document in zip(answers, documents, strict=True) if n)
    torch.testing.assert_close(result(blocks), expected / sum(answers))


def test_what_does_not_count_teaches_nothing():
    """Neither KL nor cross entropy change with what is said where nothing counts behind it."""
    model = tiny_model("llama")
    native = model.config._attn_implementation
    swap(model, AUGMENTED)
    student = add_lora(model.requires_grad_(False), Lora())
    ids = packed()[0].ids[:1, :21]
    counted = torch.zeros_like(ids, dtype=torch.bool)
    counted[:, 5:9] = True
    batch = causal_batch(Blocks(ids, None, counted))
    assert batch.counted.nonzero()[:, 1].tolist() == [4, 5, 6, 7]  # which say tokens 5 to 8
    other = ids.clone()
    other[:, 9:] = other[:, 9:].flip(1)
    for weights in (Distill(kl=1.0), Distill(kl=0.0, ce=1.0)):
        objective = Distillation(student, native, weights)
        loss = objective(batch)[0]
        torch.testing.assert_close(objective(causal_batch(Blocks(other, None, counted)))[0], loss)
        whole = objective(causal_batch(Blocks(other)))[0]
        assert (whole - loss).abs() > 1e-4


# Their layers get no position_ids.
@pytest.mark.parametrize(
    "family", ["codegen", "gpt-bigcode", "gpt-j", "gpt-neo", "gpt-neox-japanese", "llama4", "deepseek-v3.2"]
)
def test_documents_are_apart_where_layers_get_no_positions(family):
    model = tiny_model(family)
    native = model.config._attn_implementation
    swap(model, AUGMENTED)
    check_document_masking(model, native)


@pytest.mark.parametrize(
    ("family", "who"), [("llama", "converted"), ("qwen3-next", "base"), ("bloom", "takes no")]
)
def test_a_model_that_cannot_is_refused(family, who, monkeypatch):
    model = tiny_model(family)
    native = model.config._attn_implementation
    swap(model, AUGMENTED)
    if who == "converted":
        for module, name in ((layer_module, "document_starts"), (dispatch, "starts_in")):
            monkeypatch.setattr(module, name, lambda *given: None)
    with pytest.raises(UserError, match=who):
        check_document_masking(model, native)
