"The similarity-preserving loss over random activations and networks, against loops, and bad input."

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lbyl_nb.expand import contract, expand
from lbyl_nb.models import digits_net
from lbyl_nb.recover import lbyl_restore, restore
from lbyl_nb.similarity import _paired, _watched_layers, similarities, similarity, similarity_loss


def naive(pairs):
    "The loss by loops over images."
    total = 0.0
    for T, S in pairs:
        teacher, student = naive_similarities(T), naive_similarities(S)
        for t, s in zip(teacher, student):
            total += sum((a - b) ** 2 for a, b in zip(t, s)) / len(T) ** 2
    return total / len(pairs)


def naive_similarities(A):
    "Products of all images with each other, every row divided by its length."
    rows = []
    for a in A:
        row = [float((a * b).sum()) for b in A]
        length = max(sum(v * v for v in row) ** 0.5, 1e-12)
        rows.append([v / length for v in row])
    return rows


shape = st.lists(st.integers(1, 4), max_size=3)
pairs_of_shapes = st.lists(st.tuples(shape, shape), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), pairs_of_shapes, st.integers(0, 99))
def test_against_loops(b, shapes, seed):
    "Any number of pairs, with activations of different shapes in teacher and student."
    gen = torch.Generator().manual_seed(seed)
    draw = lambda shape: torch.randn(b, *shape, generator=gen, dtype=torch.float64)
    pairs = [(draw(t), draw(s)) for t, s in shapes]
    teacher = {str(i): [similarities(t)] for i, (t, _) in enumerate(pairs)}
    student = {str(i): [similarities(s)] for i, (_, s) in enumerate(pairs)}
    loss = similarity_loss(teacher, student).item()
    assert loss == pytest.approx(naive(pairs), rel=1e-10, abs=1e-14)


def hooks(*nets):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for n in nets for m in n.modules())


STUDENTS = dict(
    same=lambda n, x: n,
    expanded=lambda n, x: expand(n),
    consecutive=lambda n, x: expand(n, composed=False),
    restored=lambda n, x: expand(lbyl_restore(n, x[:1], ratio=0.5)),
)


@pytest.mark.parametrize('student', STUDENTS)
def test_training_step(student):
    "Gradients reach every factor; hooks are gone; the contracted student has the same loss."
    torch.manual_seed(0)
    teacher, x = digits_net(8).eval(), torch.randn(6, 1, 8, 8)
    net = STUDENTS[student](copy.deepcopy(teacher), x)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.02 * torch.randn_like(p)
    with similarity(teacher, net) as similar:
        net(x)
        loss = similar(x)
        loss.backward()
    assert 0 < loss <= 4 / 6 and hooks(teacher, net) == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    if 'Expanded' in str(net):
        small = contract(net)
        with similarity(teacher, small) as similar:
            small(x)
            assert similar(x).item() == pytest.approx(loss.item(), rel=1e-3)


def test_evaluation_in_between_changes_nothing():
    "What counts is the last forward pass; other passes inside the block leave nothing behind."
    torch.manual_seed(0)
    teacher, x = digits_net(8).eval(), torch.randn(6, 1, 8, 8)
    net = lbyl_restore(teacher, x[:1], ratio=0.5)
    with similarity(teacher, net) as similar:
        net(x)
        first = similar(x)
        with torch.no_grad():
            net(x[:2])
            teacher(x[:3])
        net(x)
        assert torch.equal(similar(x), first)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_activations_do_not_overflow(dtype):
    "Sums of squares beyond float16's largest number."
    A = torch.full((3, 20000), 60.0, dtype=dtype)
    assert similarities(A).dtype == torch.float32
    torch.testing.assert_close(similarities(A), torch.full((3, 3), 3**-0.5))


def test_amp_with_gradient_scaling():
    "Autocast and a gradient scaler: gradients are float32 and finite."
    torch.manual_seed(0)
    teacher, x = digits_net(8).eval(), torch.randn(6, 1, 8, 8)
    net = expand(lbyl_restore(teacher, x[:1], ratio=0.5))
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0**10)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.01)
    with similarity(teacher, net) as similar:
        for _ in range(2):
            optimiser.zero_grad()
            with torch.autocast('cpu', torch.bfloat16):
                loss = F.cross_entropy(net(x), torch.arange(6)) + 3000 * similar(x)
            scaler.scale(loss).backward()
            scaler.step(optimiser)
            scaler.update()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())


def test_bad_input():
    teacher, net, x = digits_net(8).eval(), digits_net(4).eval(), torch.randn(6, 1, 8, 8)
    says = "student has no layer 'features.3x'; similar: .*features.3"
    with pytest.raises(ValueError, match=says):
        _paired(teacher, net, ['features.3x'])
    with pytest.raises(ValueError, match='teacher has no layer'):
        _paired(nn.Sequential(nn.Linear(2, 2)), net)
    with similarity(teacher, net) as similar:
        with pytest.raises(ValueError, match='student has not run'):
            similar(x)
        net(x)
        with pytest.raises(ValueError, match='5 images in the teacher and 6 in the student'):
            similar(x[:5])

    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    p = nn.Sequential(Pair())
    with pytest.raises(TypeError, match='0: gives tuple'):
        with _watched_layers(p, ['0']):
            p(x)
    assert hooks(teacher, net, p) == 0


class Attentive(nn.Module):
    "Tokens, an attention layer, a decision."

    def __init__(self):
        super().__init__()
        self.into = nn.Linear(8, 16)
        self.block = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.out = nn.Linear(16, 10)

    def forward(self, x):
        return self.out(self.block(self.into(x)).mean(1))


def test_layers_that_one_side_does_not_call_are_left_out():
    "Attention reads the weight of `out_proj`, and calls it once it is restored."
    torch.manual_seed(0)
    teacher, x = Attentive().eval(), torch.randn(6, 5, 8)
    student = restore(teacher, x, ratio=0.5).model.train()
    called = ['into', 'block.linear1', 'block.linear2', 'out']
    outputs = {net: {} for net in (teacher, student)}
    with similarity(teacher, student) as similar:
        for net, seen in outputs.items():
            for k in called:
                note = lambda m, args, out, k=k, seen=seen: seen.update({k: out})
                net.get_submodule(k).register_forward_hook(note)
        student(x)
        loss = similar(x)
    pairs = [[outputs[net][k].detach() for net in (teacher, student)] for k in called]
    assert loss.item() == pytest.approx(naive(pairs), rel=1e-4) and loss > 1e-6
    loss.backward()
    with similarity(teacher, student, ['block.self_attn.out_proj']) as similar:
        student(x)
        with pytest.raises(ValueError, match='used 0 times by the teacher and 1 times'):
            similar(x)


def test_nothing_left_to_compare():
    torch.manual_seed(0)
    turned = lambda: nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 4))
    teacher, student, x = turned(), turned(), torch.randn(5, 7, 4)
    with similarity(teacher, student) as similar:
        student(x)
        with pytest.raises(ValueError, match='no layers to compare'):
            similar(x)


@pytest.mark.parametrize('factor', [1e-20, 1e-8, 1e-4, 1e8, 1e15, 1e20])
def test_a_common_factor_changes_nothing(factor):
    A = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(similarities(A * factor), similarities(A))
    A, b = A.double().requires_grad_(), torch.rand(4, 4, dtype=torch.float64)
    [at_one] = torch.autograd.grad((similarities(A) * b).sum(), A)
    [there] = torch.autograd.grad((similarities(A * factor) * b).sum(), A)
    torch.testing.assert_close(there, at_one)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_teacher_of_another_precision(dtype):
    torch.manual_seed(0)
    teacher, student, x = digits_net(8).eval(), digits_net(4).eval(), torch.randn(6, 1, 8, 8)
    losses = []
    for guide in (teacher, copy.deepcopy(teacher).to(dtype)):
        with similarity(guide, student) as similar:
            student(x)
            losses.append(similar(x))
            losses[-1].backward()
    assert losses[1].dtype == torch.float32
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.05)


def test_teacher_can_be_trained_afterwards():
    "What it made for itself in its first pass is fit for gradients."

    class Made(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.table = nn.Linear(8, 3), None

        def forward(self, x):
            if self.table is None:
                self.table = torch.ones(8)
            return self.linear(x * self.table.requires_grad_())

    teacher, student, x = Made(), Made(), torch.randn(4, 8)
    with similarity(teacher, student) as similar:
        student(x)
        similar(x)
    teacher(x).sum().backward()
    assert teacher.linear.weight.grad is not None


class Checkpointed(nn.Module):
    "Two layers behind each other, the second of them checkpointed or not."

    def __init__(self, reentrant=None):
        super().__init__()
        self.first, self.second, self.reentrant = nn.Linear(4, 5), nn.Linear(5, 3), reentrant

    def forward(self, x):
        h = self.first(x).relu()
        if self.reentrant is None:
            return self.second(h)
        return torch.utils.checkpoint.checkpoint(self.second, h, use_reentrant=self.reentrant)


def gradients(reentrant):
    "What the loss tells the student's layers, in a step with a loss on the output as well."
    torch.manual_seed(0)
    student, x = Checkpointed(reentrant), torch.randn(6, 4)
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        teacher.second.weight.normal_()
    with similarity(teacher, student) as loss:
        out = student.train()(x)
        (out.square().mean() + loss(x)).backward()
    return [v.grad for v in student.parameters()]


def test_checkpointed_layers_are_trained_or_refused():
    for got, expected in zip(gradients(False), gradients(None), strict=True):
        torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match='second: the student ran it without gradients.*reentrant'):
        gradients(True)


def test_frozen_layers_and_measurements_need_no_gradients():
    student, x = Checkpointed(), torch.randn(6, 4)
    teacher = copy.deepcopy(student)
    with similarity(teacher, student) as loss:
        student.train().first.requires_grad_(False)
        student(x)
        assert loss(x) == 0
        with torch.no_grad():
            student(x)
            assert loss(x) == 0
        student.eval()
        with torch.no_grad():
            student(x)
        assert loss(x) == 0
