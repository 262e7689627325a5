"""Small networks treat channels in one way each; the analysis must find which transforms are allowed."""

import functools

import torch
from helpers.soundness import make_case, violations
from torch import nn
from torch.nn import functional as F

from quantize.graph.allowed_transforms import AllowedTransforms
from quantize.graph.analysis import find_bases

NONE, LINEAR, DIAGONAL, POSITIVE = (
    AllowedTransforms.NONE,
    AllowedTransforms.LINEAR,
    AllowedTransforms.DIAGONAL,
    AllowedTransforms.POSITIVE_DIAGONAL,
)
ORTHOGONAL, CENTRED = AllowedTransforms.ORTHOGONAL, AllowedTransforms.CENTRED_ORTHOGONAL
EPS = 1e-5


class Net(nn.Module):
    """A network `head(x + down(body(up(x))))` with parameters that bodies may use."""

    def __init__(self, body):
        super().__init__()
        self.table, self.up, self.down, self.head = (
            nn.Embedding(50, 12), nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 50),
        )  # fmt: skip
        self.gate, self.key, self.score, self.norm = (
            nn.Linear(12, 20),
            nn.Linear(12, 20),
            nn.Linear(12, 4),
            nn.LayerNorm(20),
        )
        self.conv, self.depthwise = nn.Conv1d(20, 20, 3, padding=1), nn.Conv1d(20, 20, 3, padding=1, groups=20)
        self.gain, self.gains, self.places = (nn.Parameter(torch.ones(s)) for s in ((20,), (4, 5), (32, 20)))
        self.square, self.wide, self.experts = (nn.Parameter(torch.ones(s)) for s in ((20, 20), (40, 20), (3, 20, 20)))
        self.register_buffer("constant", torch.linspace(-1, 1, 20))
        self.body = body

    def forward(self, ids):
        x = self.table(ids)
        return self.head(x + self.down(self.body(self, self.up(x), x)))


def heads(t):
    return t.unflatten(-1, (4, 5)).transpose(1, 2)


def joined(t):
    return t.transpose(1, 2).flatten(-2)


def attend(q, k, v, **arguments):
    return joined(F.scaled_dot_product_attention(heads(q), heads(k), heads(v), **arguments))


def by_hand(q, k, v):
    return joined(torch.softmax(heads(q) @ heads(k).transpose(-1, -2), dim=-1) @ heads(v))


def values_and_bias(net, h, x):
    """Add a bias to values that are in heads already."""
    scores = heads(net.gate(x)) @ heads(net.key(x)).transpose(-1, -2)
    return joined(torch.softmax(scores, dim=-1) @ (heads(h) + net.gain.view(1, 1, 4, 5).permute(0, 2, 1, 3)))


def grouped(net, h, x):
    """Attend with four query heads on two key/value heads."""
    k, v = (heads(t)[:, :2].repeat_interleave(2, dim=1) for t in (net.key(x), h))
    return joined(F.scaled_dot_product_attention(heads(net.gate(x)), k, v))


def grouped_inside(net, h, x):
    k, v = (heads(t)[:, :2] for t in (net.key(x), h))
    return joined(F.scaled_dot_product_attention(heads(net.gate(x)), k, v, enable_gqa=True))


def biased(net, h, x):
    """Add a bias for each head and key to the scores as they are computed."""
    q, k, v = (heads(t).flatten(0, 1) for t in (h, net.key(x), net.gate(x)))
    scores = torch.baddbmm(net.score(x).transpose(1, 2).reshape(-1, 1, h.shape[1]), q, k.transpose(1, 2))
    return joined((torch.softmax(scores, dim=-1) @ v).unflatten(0, (-1, 4)))


def halves(h):
    a, b = h.chunk(2, dim=-1)
    return torch.cat([a + b, a - b], dim=-1)


def crossed(net, h, x):
    """Combine the halves with those of others in one order in the first part, in the other order in the second."""
    (a, b), (c, d) = h.chunk(2, dim=-1), net.gate(x).chunk(2, dim=-1)
    first = torch.cat([a[..., :5] + c[..., :5], a[..., 5:] + d[..., 5:]], dim=-1)
    second = torch.cat([b[..., :5] + d[..., :5], b[..., 5:] + c[..., 5:]], dim=-1)
    return torch.cat([first + second, first - second], dim=-1)


def standardized(h, deviation):
    return (h - h.mean(-1, keepdim=True)) / deviation


# what happens to `up(x)`, what is allowed on the basis that it (or the parameter named) writes, and the number of heads
BODIES = {
    "nothing": (lambda n, h, x: h, LINEAR, 1),
    "number": (lambda n, h, x: -h * 2 / 3, LINEAR, 1),
    "relu": (lambda n, h, x: torch.relu(h), POSITIVE, 1),
    "leaky relu": (lambda n, h, x: F.leaky_relu(h), POSITIVE, 1),
    "gelu": (lambda n, h, x: F.gelu(h), NONE, 1),
    "gate": (lambda n, h, x: h * F.silu(n.gate(x)), DIAGONAL, 1),
    "gate behind": (lambda n, h, x: F.silu(n.gate(x)) * h, DIAGONAL, 1),
    "gated by itself": (lambda n, h, x: h * torch.sigmoid(h), NONE, 1),
    "product of channels": (lambda n, h, x: h * n.gate(x), NONE, 1),
    "divisor": (lambda n, h, x: n.gate(x) / (h * h + 1), NONE, 1),
    "divided": (lambda n, h, x: 1 / h, NONE, 1),
    "gain": (lambda n, h, x: h * n.gain, DIAGONAL, 1),
    "gain and one": (lambda n, h, x: (1 + n.gain) * h, DIAGONAL, 1),
    "gain of heads": (lambda n, h, x: joined(heads(h) * n.gain[:5]), DIAGONAL, 1),
    "gains of a table": (lambda n, h, x: joined(heads(h) * n.gains[:, None]), DIAGONAL, 1),
    "factor of a token": (lambda n, h, x: h * torch.sigmoid(n.score(x)[..., :1]), LINEAR, 1),
    "factor of a head": (
        lambda n, h, x: joined(heads(h) * torch.sigmoid(n.score(x)).transpose(1, 2)[..., None]), LINEAR, 4,
    ),
    "constant factor": (lambda n, h, x: h * n.constant, DIAGONAL, 1),
    "constant": (lambda n, h, x: h + n.constant, NONE, 1),
    "number added": (lambda n, h, x: h + 1, NONE, 1),
    "mean of tokens": (lambda n, h, x: h + h.mean(1, keepdim=True), LINEAR, 1),
    "sum over tokens": (lambda n, h, x: h.cumsum(1), LINEAR, 1),
    "sum over channels": (lambda n, h, x: h.cumsum(-1), NONE, 1),
    "tokens rolled": (lambda n, h, x: h.roll(1, dims=1), LINEAR, 1),
    "channels reversed": (lambda n, h, x: h.flip(-1), LINEAR, 1),
    "tokens picked": (lambda n, h, x: h[:, torch.tensor([1, 0, 1])].mean(1, keepdim=True), LINEAR, 1),
    "channels picked": (lambda n, h, x: h[:, :, torch.arange(19, -1, -1)], NONE, 1),
    "tokens padded": (lambda n, h, x: F.pad(h, (0, 0, 1, 0))[:, :-1], LINEAR, 1),
    "padded with ones": (lambda n, h, x: F.pad(h, (0, 0, 1, 0), value=1.0)[:, :-1], NONE, 1),
    "channels padded": (lambda n, h, x: F.pad(h, (1, 0))[..., :-1], NONE, 1),
    "tokens masked": (lambda n, h, x: h.masked_fill((torch.sigmoid(n.score(x)[..., :1]) > 0.5), 0.0), LINEAR, 1),
    "tokens replaced": (
        lambda n, h, x: h.masked_scatter((torch.sigmoid(n.score(x)[..., :1]) > 0.5).expand_as(h), n.gate(x)), LINEAR, 1,
    ),
    "channels replaced": (lambda n, h, x: h.masked_scatter(n.gate(x) > 0, h.flip(1)), NONE, 1),
    "tokens replaced by numbers": (
        lambda n, h, x: h.masked_scatter((n.score(x)[..., :1] > 0).expand_as(h), n.constant.expand_as(h)), NONE, 1,
    ),
    "masked by minus one": (lambda n, h, x: h.masked_fill((torch.sigmoid(n.score(x)[..., :1]) > 0.5), -1.0), NONE, 1),
    "root mean square": (lambda n, h, x: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS), ORTHOGONAL, 1),
    "of its own product": (lambda n, h, x: h * torch.rsqrt((h * h).mean(-1, keepdim=True) + EPS), ORTHOGONAL, 1),
    "of heads": (
        lambda n, h, x: joined(heads(h) * torch.rsqrt(heads(h).pow(2).mean(-1, keepdim=True) + EPS)), ORTHOGONAL, 4,
    ),
    "of a part": (
        lambda n, h, x: h * torch.rsqrt(torch.cat([h, h[..., :7]], -1).pow(2).mean(-1, keepdim=True) + EPS),
        ORTHOGONAL, 1,
    ),
    "length": (lambda n, h, x: h / h.norm(dim=-1, keepdim=True), ORTHOGONAL, 1),
    "other length": (lambda n, h, x: h / h.norm(p=4, dim=-1, keepdim=True), NONE, 1),
    "cube": (lambda n, h, x: h / (h.pow(4).mean(-1, keepdim=True) + EPS), NONE, 1),
    "square of tokens": (lambda n, h, x: h * torch.rsqrt(h.pow(2).mean(1, keepdim=True) + EPS), NONE, 1),
    "square": (lambda n, h, x: h + h.pow(2), NONE, 1),
    "rms norm": (lambda n, h, x: F.rms_norm(h, (20,)), ORTHOGONAL, 1),
    "layer norm": (lambda n, h, x: F.layer_norm(h, (20,)), CENTRED, 1),
    "layer norm with gain": (lambda n, h, x: n.norm(h), NONE, 1),
    "group norm": (lambda n, h, x: F.group_norm(h.transpose(1, 2), 4).transpose(1, 2), NONE, 1),
    "variance": (lambda n, h, x: standardized(h, (h.var(-1, keepdim=True, unbiased=False) + EPS).sqrt()), CENTRED, 1),
    "deviation": (lambda n, h, x: standardized(h, h.std(-1, keepdim=True)), CENTRED, 1),
    "mean": (lambda n, h, x: h - h.mean(-1, keepdim=True), CENTRED, 1),
    "mean of others": (lambda n, h, x: n.norm(n.gate(x)) - h.mean(-1, keepdim=True), NONE, 1),
    "sum as a factor": (lambda n, h, x: h * h.sum(-1, keepdim=True), NONE, 1),
    "halves": (lambda n, h, x: halves(h), LINEAR, 1),
    "halves crossed": (crossed, LINEAR, 1),
    "one to all": (lambda n, h, x: h + h[..., :1], DIAGONAL, 1),
    "parameter added": (lambda n, h, x: h + n.places[: h.shape[1]], LINEAR, 1),
    "parameter put in front": (
        lambda n, h, x: torch.cat([n.places[:1].expand(h.shape[0], 1, 20), h], 1)[:, 1:] + n.places[0], LINEAR, 1,
    ),
    "nothing put in front": (
        lambda n, h, x: torch.cat([n.places[:0].expand(h.shape[0], 0, 20), h], 1), LINEAR, 1,
    ),
    "bias in heads": (lambda n, h, x: joined(heads(h) + n.gain.view(4, 1, 5)), LINEAR, 1),
    "constant put in front": (lambda n, h, x: torch.cat([n.constant.expand(h.shape[0], 1, 20), h], 1)[:, 1:], NONE, 1),
    "parameter as matrix": (lambda n, h, x: h @ n.square, LINEAR, 1),
    "computed matrix": (lambda n, h, x: h @ torch.sigmoid(n.square), NONE, 1),
    "matrix used elsewhere": (lambda n, h, x: h @ n.square * torch.sigmoid(n.square.sum()), NONE, 1),
    "parts of a matrix": (lambda n, h, x: F.linear(h, n.wide[:20]) + F.linear(2 * h, n.wide[20:]), LINEAR, 1),
    "parts that overlap": (lambda n, h, x: F.linear(h, n.wide[:20]) + F.linear(h, n.wide[10:30]), NONE, 1),
    "every other row of a matrix": (lambda n, h, x: F.linear(h, n.wide.view(20, 40)[:, 20:]), LINEAR, 1),
    "matrix in heads": (lambda n, h, x: (heads(h) @ n.square.view(4, 5, 20)).sum(1), NONE, 1),
    "matrix rearranged": (lambda n, h, x: F.linear(h, n.wide.t().reshape(40, 20)[:20]), NONE, 1),
    "twice": (lambda n, h, x: torch.relu(h) + torch.relu(n.up(2 * x)), POSITIVE, 1),
    "experts": (
        lambda n, h, x: torch.bmm(h.reshape(1, -1, 20).expand(3, -1, 20), n.experts).mean(0).view_as(h), LINEAR, 1,
    ),
    "convolution": (lambda n, h, x: n.conv(h.transpose(1, 2)).transpose(1, 2), LINEAR, 1),
    "depthwise convolution": (lambda n, h, x: n.depthwise(h.transpose(1, 2)).transpose(1, 2), NONE, 1),
    "no rule": (lambda n, h, x: h.cumprod(-1), NONE, 1),
    "square scaled": (lambda n, h, x: h * (h.pow(2) * n.constant).mean(-1, keepdim=True), NONE, 1),
    "square moved": (lambda n, h, x: h * h.pow(2).flip(1).mean(-1, keepdim=True), NONE, 1),
    "square shaped": (lambda n, h, x: h * h.pow(2).view_as(h).mean(-1, keepdim=True), NONE, 1),
    "square clipped": (lambda n, h, x: h * torch.relu(h.pow(2)).mean(-1, keepdim=True), NONE, 1),
    "square normalized": (lambda n, h, x: F.layer_norm(h * h, (20,)), NONE, 1),
    "square read": (lambda n, h, x: F.linear(h * h, n.square), NONE, 1),
    "square convolved": (lambda n, h, x: n.conv(h.transpose(1, 2).square()).transpose(1, 2), NONE, 1),
    "square mixed": (lambda n, h, x: F.scaled_dot_product_attention(n.gate(x), n.key(x), h * h), NONE, 1),
    "dividing": (lambda n, h, x: n.gate(x) / h, NONE, 1),
    "norm of two axes": (lambda n, h, x: F.layer_norm(h.unflatten(-1, (4, 5)), (4, 5)).flatten(-2), NONE, 1),
    "norm with a constant": (lambda n, h, x: F.layer_norm(h, (20,), None, n.constant), NONE, 1),
    "deviation of all": (lambda n, h, x: h / h.std(), NONE, 1),
    "computed bias": (lambda n, h, x: F.linear(h, n.square, torch.sigmoid(n.gain)), LINEAR, 1),
    "as a bias": (lambda n, h, x: F.linear(n.gate(x), n.square, h[0, 0]), NONE, 1),
    "as an added bias": (
        lambda n, h, x: torch.addmm(h[0, 0], n.gate(x).flatten(0, 1), n.square).view_as(h), NONE, 1,
    ),
    "gain behind a nonlinearity": (lambda n, h, x: F.gelu(h) * n.gain, DIAGONAL, 1, "gain"),
    "channels as rows": (lambda n, h, x: (torch.sigmoid(n.square) @ h.transpose(1, 2)).transpose(1, 2), NONE, 1),
    "keys without queries": (lambda n, h, x: attend(torch.sigmoid(n.key(x)), h, n.gate(x)), NONE, 4),
    "queries with a bias": (biased, LINEAR, 4),
    "values": (lambda n, h, x: attend(n.gate(x), n.key(x), h), LINEAR, 4),
    "values by hand": (lambda n, h, x: by_hand(n.gate(x), n.key(x), h), LINEAR, 4),
    "values with a bias in heads": (values_and_bias, LINEAR, 4),
    "queries": (lambda n, h, x: attend(h, n.key(x), n.gate(x)), LINEAR, 4),
    "queries by hand": (lambda n, h, x: by_hand(h, n.key(x), n.gate(x)), LINEAR, 4),
    "queries that are keys": (lambda n, h, x: attend(h, h, n.gate(x)), ORTHOGONAL, 4),
    "queries without keys": (lambda n, h, x: attend(h, torch.sigmoid(n.key(x)), n.gate(x)), NONE, 4),
    "grouped values": (grouped, LINEAR, 2),
    "values grouped inside": (grouped_inside, LINEAR, 2),
}  # fmt: skip


@functools.cache
def case(name):
    return make_case(Net(BODIES[name][0]))


def check_body(name):
    """Check that the allowed transforms of a body are as expected, and that none of them changes the function."""
    bases = find_bases(case(name).program)
    _, group, heads, *parameter = BODIES[name]
    written = [b for b in bases.all if any(e.parameter == (parameter or ["up.weight"])[0] for e in b.writers)]
    largest = max(written, key=lambda b: b.dim)
    assert (largest.allowed, largest.heads if group else heads) == (group, heads), largest
    assert not violations(case(name), bases)
