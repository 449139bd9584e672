"""What a network does with its parameters besides calling its layers."""

import pytest
import torch
import torch.nn.functional as F
from test_right_or_refused import Net, first_half, gap, out, repeat
from torch import nn

from lbyl_nb.layerwise import layerwise
from lbyl_nb.probes import calibration
from lbyl_nb.recover import restore
from lbyl_nb.restorers import prune_only


def reasons(done):
    "{layer: why it was left alone}."
    return dict(zip(done.report.layer, done.report.left_alone))


READS = dict(
    decoder=lambda b, z: F.linear(z, b.weight.t()),
    einsum=lambda b, z: torch.einsum('nz,zh->nh', z, b.weight),
    product=lambda b, z: z @ b.weight,
    norm=lambda b, z: F.pad(z / b.weight.norm(dim=1), (0, 8)),
    bias=lambda b, z: F.pad(z * b.bias, (0, 8)),
    looked_up=lambda b, z: F.pad(z + b.weight[:, 0], (0, 8)),
)


@pytest.mark.parametrize('read', READS)
@pytest.mark.parametrize('refit', [False, True])
def test_a_layer_whose_weight_is_read_elsewhere_too_stays_as_it_is(read, refit):
    torch.manual_seed(0)
    layers = dict(s=nn.Linear(6, 12), a=nn.Linear(12, 16), b=nn.Linear(16, 8), o=nn.Linear(16, 5))

    def forward(m, x):
        z = F.relu(m.b(F.relu(m.a(F.relu(m.s(x))))))
        return m.o(F.relu(READS[read](m.b, z)))

    net, x = Net(forward, **layers).eval(), torch.randn(64, 6)
    repeat(net.s)
    way = layerwise(calibration(x), refit=refit, ridge=1e-9)
    done = restore(net, x, keep=dict(s=first_half(net.s)), restorer=way)
    assert torch.equal(done.model.b.weight, net.b.weight)
    assert torch.equal(done.model.b.bias, net.b.bias)
    assert gap(out(done.model, x), out(net, x)) < 1e-3
    if read != 'bias':
        assert 'b has a weight or bias that is read outside' in reasons(done)['a']
        with pytest.raises(ValueError, match='a cannot be pruned: b has a weight'):
            restore(net, x, ratio=dict(a=0.5), restorer=prune_only())


def test_to_ask_for_the_type_of_a_weight_is_not_to_read_it():
    torch.manual_seed(0)
    layers = dict(a=nn.Linear(6, 16), b=nn.Linear(16, 8), o=nn.Linear(8, 3))

    def forward(m, x):
        x = F.relu(m.a(x.to(m.a.weight.dtype)))
        return m.o(F.relu(m.b(x.to(m.b.weight.device))))

    net, x = Net(forward, **layers).eval(), torch.randn(64, 6)
    assert {'a', 'b'} <= restore(net, x, ratio=0.5, restorer=prune_only()).plan.keys()
