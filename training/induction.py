"""Gives a half-trained model its first induction heads, fitted by ridge regression.

An induction head finds the earlier place whose previous token is the current one and copies
what stood there; recall over long distances grows from it. Gradient descent finds it only
after a long plateau, longer than a small run lasts. So one head gets RoPE phases that look one
token back and writes what it sees to a quiet part of the residual stream; a later head has its
queries fitted to the current token, its keys to the previous one and its values to the token
itself. That alone lowers the loss of repeated text a little; training does the rest, at once.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from training.model import Attention, Layer, Llama, token_losses

RIDGE = 1e-3
SLOWEST = 15  # pairs of RoPE dimensions that carry a match; they turn least with distance
FASTEST = 10  # pairs that tell neighbours apart
WRITE = 6.0  # size of what the previous-token head writes, in units of what stood there
NEIGHBOUR_GAIN = 7.0  # size of the constant queries and keys of the previous-token head
SHARPNESS = (2.0, 3.0, 4.5)  # of the match: candidates
STRENGTH = (0.0, 2.0, 4.0, 6.0)  # of the copy, in logits: candidates


@dataclass(frozen=True)
class Fit:
    """One head: query, key, value [head_size, hidden] and output [hidden, head_size]."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor


@dataclass(frozen=True)
class Text:
    """Tokens to fit on and what stands for a token in the fits."""

    tokens: Tensor  # [batch, length]
    code: Tensor  # [vocab, head_size], uncorrelated and of unit size over the text
    basis: Tensor  # [hidden, head_size], the embedding directions the code comes from


def describe(model: Llama, tokens: Tensor) -> Text:
    """Code every token by the main directions of its embedding over the text."""
    table = model.embed_tokens.weight
    seen = table[tokens.flatten()]
    centred = table - seen.mean(0)
    _, directions = torch.linalg.eigh((seen - seen.mean(0)).T @ (seen - seen.mean(0)))
    basis = directions[:, -model.config.head_size :].flip(1)
    code = centred @ basis
    code = functional.normalize(code / code[tokens.flatten()].std(0), dim=-1)
    return Text(tokens, code * code.shape[-1] ** 0.5, basis)


def attention_inputs(model: Llama, tokens: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """The residual stream before layer `index` and its norm, each [batch, length, hidden]."""
    caught: list[tuple[Tensor, Tensor]] = []
    norm = layer_at(model, index).input_layernorm
    hook = norm.register_forward_hook(lambda _, inputs, output: caught.append((inputs[0], output)))
    model.hidden(tokens)
    hook.remove()
    return caught[0]


def layer_at(model: Llama, index: int) -> Layer:
    """Layer `index`."""
    layer = model.layers[index]
    assert isinstance(layer, Layer)
    return layer


def regress(inputs: Tensor, targets: Tensor) -> Tensor:
    """Ridge regression of targets [n, m] on inputs [n, hidden]; returns [m, hidden]."""
    gram = inputs.T @ inputs
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
    weights: Tensor = torch.linalg.solve(gram, inputs.T @ targets)
    return weights.T


def fit_previous(model: Llama, text: Text, index: int) -> Fit:
    """A head that looks one token back and writes that token's code where little else is."""
    config = model.config
    _, inputs = attention_inputs(model, text.tokens, index)
    inputs = inputs.flatten(0, 1)
    constant = regress(inputs, torch.ones(len(inputs), 1, device=inputs.device))
    pair = torch.arange(FASTEST, device=inputs.device)
    angle = config.rope_theta ** (-2.0 * pair / config.head_size)
    query = torch.zeros(config.head_size, config.hidden_size, device=inputs.device)
    key = torch.zeros_like(query)
    key[pair] = NEIGHBOUR_GAIN * constant
    query[pair] = NEIGHBOUR_GAIN * angle.cos()[:, None] * constant
    query[pair + config.head_size // 2] = -NEIGHBOUR_GAIN * angle.sin()[:, None] * constant
    value = regress(inputs, text.code[text.tokens.flatten()])
    stream, _ = attention_inputs(model, text.tokens, index + 1)
    stream = stream.flatten(0, 1)
    sizes, directions = torch.linalg.eigh(stream.T @ stream / len(stream))
    quiet = directions[:, : config.head_size]
    return Fit(query, key, value, quiet * sizes[: config.head_size].mean().sqrt() * WRITE)


def fit_induction(model: Llama, text: Text, index: int) -> Fit:
    """A head that looks at places after an earlier copy of the current token and copies them."""
    size = model.config.head_size
    _, inputs = attention_inputs(model, text.tokens, index)
    later = inputs[:, 1:].flatten(0, 1)
    now, before = text.tokens[:, 1:].flatten(), text.tokens[:, :-1].flatten()
    slow = torch.arange(size // 2 - SLOWEST, size // 2, device=later.device)
    slow = torch.cat((slow, slow + size // 2))
    match = text.code[:, : len(slow)]
    query = torch.zeros(size, later.shape[-1], device=later.device)
    key = torch.zeros_like(query)
    query[slow] = regress(later, match[now])
    key[slow] = regress(later, match[before])
    value = regress(later, text.code[now])
    # An own logit of 1 for the token that is copied, whatever the size of the stream.
    rows = model.embed_tokens.weight[now] @ text.basis  # [n, head_size]
    own = (rows * text.code[now]).sum(-1).mean() * model.norm.weight.mean()
    final = stream_size(model, text.tokens)
    return Fit(query, key, value, text.basis * final / own)


def stream_size(model: Llama, tokens: Tensor) -> Tensor:
    """Root mean square of the residual stream at the end, a scalar."""
    caught: list[Tensor] = []
    hook = model.norm.register_forward_hook(lambda _, inputs, output: caught.append(inputs[0]))
    model.hidden(tokens)
    hook.remove()
    return caught[0].square().mean().sqrt()


def put_in(attention: Attention, fit: Fit, sharpness: float, strength: float) -> None:
    """Replace the last group of heads: all its query heads get the fitted one."""
    config = attention.config
    size, group = config.head_size, config.num_heads // config.num_kv_heads
    attention.k_proj.weight[-size:] = fit.key
    attention.v_proj.weight[-size:] = fit.value
    attention.q_proj.weight[-size * group :] = (fit.query * sharpness).repeat(group, 1)
    attention.o_proj.weight[:, -size * group :] = (fit.output * strength / group).repeat(1, group)


@torch.no_grad()
def plant(model: Llama, tokens: Tensor, previous: int = 1, copying: int = 3) -> str:
    """Plant a previous-token head and, in layer `copying`, induction heads.

    They are fitted on tokens [batch, length]. Sharpness and strength are the candidates with
    the lowest loss on passages said twice. Returns a line for the log.
    """
    text = describe(model, tokens)
    put_in(layer_at(model, previous).self_attn, fit_previous(model, text, previous), 1.0, 1.0)
    half = tokens[:32, : min(128, tokens.shape[1] // 2)]
    twice = torch.cat((half, half), dim=1)
    attention = layer_at(model, copying).self_attn
    fit = fit_induction(model, text, copying)
    losses: dict[tuple[float, float], float] = {}
    for choice in itertools.product(SHARPNESS, STRENGTH):
        put_in(attention, fit, *choice)
        losses[choice] = float(token_losses(model, twice).mean())
    best = min(losses, key=losses.__getitem__)
    put_in(attention, fit, *best)
    return f"planted induction heads: (sharpness, strength) {best}, loss said twice {losses}"
