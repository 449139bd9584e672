"""What comes out is a plain module.

It is saved, copied, exported, compiled, trained alone and by several processes, in any precision.
"""

import copy
import functools
import pickle
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, call
from safetensors.torch import load_file
from test_kinds import KINDS, made
from torch import nn

from lbyl_nb.layerwise import layerwise
from lbyl_nb.probes import calibration
from lbyl_nb.recover import restore
from lbyl_nb.saved import load_restored, save_restored

pytestmark = pytest.mark.usefixtures('one_thread')  # bits are compared

HALVES = {torch.bfloat16: 2**-5, torch.float16: 2**-8}  # with the error of a few roundings


@functools.cache
def small(kind):
    """A network of a kind without 30 % of its channels, residual streams too, every layer restored.

    The dense network, inputs, the `Restoration`.
    """
    net, x = made(kind, double=False)
    r = restore(net, x, ratio=0.3, streams=True, restorer=layerwise(calibration(x)))
    return net, x, r


def out(net, x):
    with torch.no_grad():
        return net(x)


HOOKS = '_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks'


@pytest.mark.parametrize('kind', KINDS)
def test_nothing_is_left_of_the_surgery(kind):
    "The same classes and names; parameters that autograd made nothing of; no hook of ours."
    net, _, r = small(kind)
    classes = lambda net: [(k, type(m)) for k, m in net.named_modules()]
    assert classes(r.model) == classes(net)
    for p in r.model.parameters():
        assert type(p) is nn.Parameter
        assert p.is_leaf and p.requires_grad and p.grad is None
        assert p.is_contiguous()
    assert not any(getattr(m, k) for m in r.model.modules() for k in HOOKS)


@pytest.mark.parametrize('kind', KINDS)
def test_files(kind, tmp_path):
    "Into a network of the same architecture with other weights, and from there once more."
    _, x, r = small(kind)
    save_restored(r.model, r.plan, tmp_path / 'a.safetensors')
    loaded = load_restored(KINDS[kind][0]().train(), x, tmp_path / 'a.safetensors')
    assert loaded.training and torch.equal(out(loaded.eval(), x), out(r.model, x))
    save_restored(loaded, r.plan, tmp_path / 'b.safetensors')
    a, b = (load_file(tmp_path / f'{k}.safetensors') for k in 'ab')
    assert a.keys() == b.keys() == r.model.state_dict().keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('kind', KINDS)
def test_copies(kind):
    "A deep copy, and what comes back from a pickle; both live on without the original."
    _, x, r = small(kind)
    places = lambda net: {p.data_ptr() for p in net.parameters()}
    want = out(r.model, x)
    for net in (copy.deepcopy(r.model), pickle.loads(pickle.dumps(r.model))):
        assert torch.equal(out(net, x), want)
        assert not places(net) & places(r.model)
        with torch.no_grad():
            for p in net.parameters():
                p.zero_()
    assert torch.equal(out(r.model, x), want)


@pytest.mark.parametrize('kind', KINDS)
def test_export(kind):
    _, x, r = small(kind)
    exported = torch.export.export(r.model, (x,)).module()
    torch.testing.assert_close(out(exported, x), out(r.model, x), rtol=1e-6, atol=1e-6)


IN_ONNX = ['stream', 'concatenation', 'gated_depthwise', 'transposed', 'transformer_mlp']


@pytest.mark.filterwarnings('ignore')  # the exporter's own
@pytest.mark.parametrize('kind', IN_ONNX)
def test_onnx(kind, tmp_path):
    for name in ('onnx', 'onnxscript', 'onnxruntime'):
        pytest.importorskip(name, reason=f'{name} is not installed')
    import onnxruntime

    _, x, r = small(kind)
    path = tmp_path / 'small.onnx'
    torch.onnx.export(r.model, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    [y] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), out(r.model, x), rtol=1e-4, atol=1e-4)


BACKENDS = [*((k, 'aot_eager') for k in KINDS), ('stream', 'inductor')]


@pytest.mark.parametrize('kind, backend', BACKENDS)
def test_compile(kind, backend):
    if backend == 'inductor' and not any(map(shutil.which, ('c++', 'g++', 'clang++'))):
        pytest.skip('no C++ compiler')
    _, x, r = small(kind)
    torch._dynamo.reset()
    compiled = torch.compile(r.model, backend=backend)
    torch.testing.assert_close(out(compiled, x), out(r.model, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('kind', KINDS)
def test_training_goes_on(kind):
    """Gradients reach every parameter, a step along them lowers the loss.

    Batch norms learn statistics in training mode.
    """
    net, x, r = small(kind)
    student, target = copy.deepcopy(r.model), torch.randn_like(out(net, x))
    loss = lambda: F.mse_loss(student(x), target)
    before = loss()
    before.backward()
    assert all(p.grad is not None and p.grad.any() for p in student.parameters())
    steepest = max(p.grad.norm().item() for p in student.parameters())
    torch.optim.SGD(student.parameters(), 1e-3 / steepest).step()
    assert loss() < before
    state = copy.deepcopy(student.state_dict())
    out(student.train(), x)
    for k, v in student.state_dict().items():
        learns = k.endswith(('running_mean', 'running_var', 'num_batches_tracked'))
        assert torch.equal(v, state[k]) != learns


DDP = """
import sys, torch
import torch.distributed as dist, torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from lbyl_nb.models import digits_net, initialised
from lbyl_nb.recover import lbyl_restore
from safetensors.torch import save_file
folder = sys.argv[1]
def small():
    net = initialised(lambda: digits_net(4), 0).eval()
    return lbyl_restore(net, torch.zeros(1, 1, 8, 8), ratio=.5).double()
def batch():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(8, 1, 8, 8, generator=g, dtype=torch.float64)
    return x, torch.randint(10, (8,), generator=g)
def trained(net, x, y):
    opt = torch.optim.SGD(net.parameters(), .1)
    for _ in range(2):    # the second raises where a parameter got no gradient
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        opt.step()
def half(rank):
    dist.init_process_group('gloo', init_method=f'file://{folder}/meeting', rank=rank, world_size=2)
    net, (x, y) = small(), batch()
    trained(DistributedDataParallel(net), x[rank::2], y[rank::2])
    save_file(net.state_dict(), f'{folder}/{rank}.safetensors')
    dist.destroy_process_group()
if __name__ == '__main__':
    mp.start_processes(half, nprocs=2, start_method='fork')
    net = small()
    save_file(net.state_dict(), f'{folder}/before.safetensors')
    trained(net, *batch())
    save_file(net.state_dict(), f'{folder}/alone.safetensors')
"""


@pytest.mark.skipif(sys.platform == 'win32', reason='processes are forked')
def test_two_processes(tmp_path):
    "DistributedDataParallel: two processes with half a batch each end where one with all ends."
    run = call(sys.executable, '-c', DDP, tmp_path, cwd=ROOT, timeout=120, CUDA_VISIBLE_DEVICES='')
    assert run.returncode == 0, run.stdout
    names = 'before', 'alone', 0, 1
    before, alone, *both = (load_file(tmp_path / f'{k}.safetensors') for k in names)
    for k, v in alone.items():
        assert torch.equal(both[0][k], both[1][k])
        torch.testing.assert_close(both[0][k], v)
        assert k.endswith('num_batches_tracked') or 'running' in k or not torch.equal(v, before[k])


@pytest.mark.parametrize('dtype', HALVES)
@pytest.mark.parametrize('kind', KINDS)
def test_half_precision(kind, dtype):
    """The solver's precision is not the model's.

    What comes out is as near to the dense network as the restoration of the same weights in
    float32, rounded once. Weights may differ: later layers make good what earlier ones round.
    """
    net, x, r = small(kind)
    net, x = copy.deepcopy(net).to(dtype), x.to(dtype)
    wide, wide_x = copy.deepcopy(net).float(), x.float()
    low = restore(net, x, keep=r.plan, restorer=layerwise(calibration(x))).model
    full = restore(wide, wide_x, keep=r.plan, restorer=layerwise(calibration(wide_x))).model
    assert {v.dtype for v in low.state_dict().values() if v.is_floating_point()} == {dtype}
    assert out(low, x).dtype == dtype
    low, once = (copy.deepcopy(m).to(dtype).float() for m in (low, full))
    dense, want = out(wide, wide_x), out(full, wide_x)
    error = lambda m: (out(m, wide_x) - dense).norm()
    assert error(low) <= 1.02 * error(once) < dense.norm()
    far = (out(low, wide_x) - want).abs().max()
    assert far <= HALVES[dtype] * want.abs().max()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('kind', KINDS)
def test_gpu(kind):
    "Restored where it lies; close to what comes out on the CPU."
    net, x, r = small(kind)
    how = dict(keep=r.plan, restorer=layerwise(calibration(x)))
    on = restore(copy.deepcopy(net).cuda(), x.cuda(), **how)
    assert {v.device.type for v in on.model.state_dict().values()} == {'cuda'}
    torch.testing.assert_close(out(on.model, x.cuda()).cpu(), out(r.model, x), rtol=1e-2, atol=1e-2)
