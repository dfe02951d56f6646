"""Packed weights: the layout there and back, `fused_linear` and `DecoderLayers` that read them, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_decoder_layers import EPS, Step, each_level, normal, one_by_one, rope
from test_fused_linear import plain
from torch import Tensor

from mc_kernels import fused_linear, native
from mc_kernels.decoder_layers import DecoderLayers, LayerWeights
from mc_kernels.packed_weight import PackedWeight, pack_weight, packed_shape, unpack_weight
from mc_kernels.testing import Guarded, assert_within_error_rule, poisoned_empty

needs_library = pytest.mark.skipif(native.available() is not None, reason=f"no native library: {native.available()}")
each_bits = pytest.mark.parametrize("bits", [4, 8])
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


def rows_read(bits: int) -> int:
    """Rows of x up to which the level in use reads a packed weight: more are faster with the weight itself."""
    by_level = {"scalar": (4, 4), "amx-emulated": (4, 4), "avx2": (3, 1), "avx512": (4, 1)}
    by_level |= {"neon": (3, 1), "neondot": (8, 4)}
    return by_level.get(native.library().cpu_isa(), (8, 8))[bits == 8]


def parts(rows: int, inputs: int, bits: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and offsets of a weight whose products with a row of ones are of the size of 1."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, inputs), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(rows, inputs // 32, generator=generator) + 0.5) * 2 ** (2 - bits) * max(inputs, 1) ** -0.5
    return codes, scale, -(2.0 ** (bits - 1)) * scale * (0.8 + 0.4 * torch.rand(scale.shape, generator=generator))


def weight_of(rows: int, inputs: int, bits: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Packed, and what it stands for in fp32."""
    packed = pack_weight(*parts(rows, inputs, bits, seed), bits=bits)
    return packed, unpack_weight(packed, rows, inputs)


@each_bits
@pytest.mark.parametrize(("rows", "inputs"), [(16, 32), (1, 32), (33, 160), (48, 96), (0, 64), (5, 0)])
def test_there_and_back(rows: int, inputs: int, bits: int) -> None:
    codes, scale, offset = parts(rows, inputs, bits)
    packed = pack_weight(codes, scale, offset, bits=bits)
    assert packed.shape == packed_shape(rows, inputs, bits)
    assert packed.is_contiguous()
    blocks = codes.view(rows, inputs // 32, 32).double()
    want = (blocks * scale[..., None].double() + offset[..., None].double()).float().view(rows, inputs)
    assert torch.equal(unpack_weight(packed, rows, inputs), want)
    strided = pack_weight(codes.T.contiguous().T, scale.T.contiguous().T, offset, bits=bits)
    assert torch.equal(strided, packed)
    without = unpack_weight(pack_weight(codes, scale, bits=bits), rows, inputs)
    assert torch.equal(without, (blocks * scale[..., None].double()).float().view(rows, inputs))


def test_the_layout_is_the_headers() -> None:
    """Word 2 r + e of part q has in its bits 4 k to 4 k + 3 the code of row r and element 8 q + 2 k + e."""
    codes, scale, offset = parts(32, 64, 8)
    packed = pack_weight(codes, scale, offset, bits=8)
    for group, block, row, element in [(0, 0, 0, 0), (0, 1, 15, 31), (1, 0, 7, 13), (1, 1, 2, 22)]:
        q, k, e = element // 8, element % 8 // 2, element % 2
        words = packed[group, block, :512].view(torch.int16).int() & 0xFFFF
        at = 32 * q + 2 * row + e
        code = (words[at] >> 4 * k & 15) | (words[128 + at] >> 4 * k & 15) << 4
        assert int(code) == int(codes[16 * group + row, 32 * block + element])
        numbers = packed[group, block, 512:].view(torch.float32)
        assert numbers[row] == scale[16 * group + row, block]
        assert numbers[16 + row] == offset[16 * group + row, block]


CASES: list[dict[str, Any]] = [
    {"rows": 16, "inputs": 32},
    {"rows": 33, "inputs": 96, "norm": True},
    {"rows": 70, "inputs": 160, "bias": True, "residual": True},
    {"rows": 96, "inputs": 64, "swiglu": True, "norm": True, "bias": True},
    {"rows": 960, "inputs": 576, "norm": True},
    {"rows": 576, "inputs": 1536, "residual": True},
    {"rows": 2048, "inputs": 1024, "swiglu": True},
]


@each_level
@each_bits
@each_dtype
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(v) if v is not True else k for k, v in c.items()))
def test_one_row_follows_the_error_rule(backend: str, bits: int, dtype: torch.dtype, case: dict[str, Any]) -> None:
    rows, inputs, swiglu = case["rows"], case["inputs"], case.get("swiglu", False)
    packed, exact_weight = weight_of(rows, inputs, bits, seed=1)
    outputs = rows // 2 if swiglu else rows
    args: dict[str, Any] = {"x": normal(1, 1, inputs, dtype=dtype), "swiglu": swiglu}
    if case.get("norm"):
        args |= {"norm": (1 + normal(2, inputs, std=0.2)).to(dtype), "eps": EPS}
    if case.get("bias"):
        args["bias"] = normal(3, rows, dtype=dtype)
    if case.get("residual"):
        args["residual"] = normal(4, 1, outputs, dtype=dtype)
    weight = exact_weight.to(dtype)
    read = torch.full_like(weight, float("nan"))  # the weight itself is not even looked at
    guarded = Guarded(packed)
    with poisoned_empty():
        out = fused_linear(weight=read, packed=guarded.view, backend=backend, **args)
    guarded.check()
    wide = {name: x.double() if isinstance(x, Tensor) else x for name, x in args.items()}
    assert_within_error_rule(out, plain(weight=exact_weight.double(), **wide), plain(weight=weight, **args))
    torch.set_num_threads(2)
    try:
        assert torch.equal(fused_linear(weight=read, packed=packed, backend=backend, **args), out)
    finally:
        torch.set_num_threads(1)


@each_level
@each_dtype
@each_bits
def test_rows_do_not_depend_on_each_other(backend: str, dtype: torch.dtype, bits: int) -> None:
    packed, exact_weight = weight_of(144, 96, bits)
    weight, x = exact_weight.to(dtype), normal(5, 9, 96, dtype=dtype)
    args: dict[str, Any] = {"norm": normal(6, 96).to(dtype), "bias": normal(7, 144), "backend": backend}
    most, unused = rows_read(bits), torch.full_like(weight, torch.nan)
    one_by_one = [fused_linear(row, unused, packed=packed, **args) for row in x.split(1)]
    for n in range(2, most + 1):
        with poisoned_empty():
            together = fused_linear(x[:n], unused, packed=packed, **args)
        assert torch.equal(together, torch.cat(one_by_one[:n]))
    more = fused_linear(x[: most + 1], weight, packed=torch.full_like(packed, 0xFF), **args)
    assert torch.equal(more, fused_linear(x[: most + 1], weight, **args))
    exact = fused_linear(x.double(), exact_weight.double(), norm=args["norm"].double(), bias=args["bias"].double())
    rival = plain(x=x, weight=weight, norm=args["norm"], eps=1e-5, bias=args["bias"].to(dtype))
    assert_within_error_rule(torch.cat(one_by_one), exact, rival)


@each_level
@each_dtype
@each_bits
def test_every_code_meets_its_element(backend: str, dtype: torch.dtype, bits: int) -> None:
    """Rows of x with one element, of either sign, by codes that are all different: exact, as are the largest sums."""
    codes = torch.randint(0, 2**bits, (48, 64), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    packed = pack_weight(codes, torch.ones(48, 2), bits=bits)
    unused = torch.full((48, 64), torch.nan, dtype=dtype)
    for i in range(64):
        x = torch.zeros(1, 64, dtype=dtype)
        x[0, i] = -1.0 if i % 3 else 1.0
        got = fused_linear(x, unused, packed=packed, backend=backend)
        assert torch.equal(got, (codes[:, i].float() * float(x[0, i])).to(dtype)[None]), i
    full = pack_weight(torch.full((48, 64), 2**bits - 1, dtype=torch.uint8), torch.ones(48, 2), bits=bits)
    for sign in (-1.0, 1.0):
        got = fused_linear(torch.full((1, 64), sign).to(dtype), unused, packed=full, backend=backend)
        assert torch.equal(got, torch.full((1, 48), sign * 64 * (2**bits - 1)).to(dtype))


@each_level
@each_dtype
@each_bits
def test_elements_of_all_sizes(backend: str, dtype: torch.dtype, bits: int) -> None:
    """Blocks that are 2^40 apart, elements within a block that are 2^12 apart, zeros, and numbers next to nothing."""
    packed, exact_weight = weight_of(64, 256, bits)
    x = normal(3, 4, 256)
    x[0] *= 2.0 ** torch.randint(-20, 20, (8, 1), generator=torch.Generator().manual_seed(2)).expand(8, 32).reshape(-1)
    x[1] *= 2.0 ** torch.randint(-12, 0, (256,), generator=torch.Generator().manual_seed(2))
    x[2, 32:64] = 0.0
    x[3] *= 1e-33
    x = x.to(dtype)
    unused = torch.full((64, 256), torch.nan).to(dtype)
    got = torch.cat([fused_linear(row, unused, packed=packed, backend=backend) for row in x.split(1)])
    exact, weight = exact_weight.double(), exact_weight.to(dtype)
    for i in range(3):
        assert_within_error_rule(got[i], x[i].double() @ exact.T, (x[i].float() @ weight.float().T).to(dtype))
    assert (got[3].double() - x[3].double() @ exact.T).abs().max() < 1e-30


@each_level
@each_dtype
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_no_number_meets_the_weight(backend: str, dtype: torch.dtype, bad: float) -> None:
    packed, exact_weight = weight_of(48, 64, 4)
    x, weight = normal(1, 2, 64, dtype=dtype), exact_weight.to(dtype)
    x[1, 40] = bad
    got = fused_linear(x, weight, packed=torch.full_like(packed, 0xFF), backend=backend)
    torch.testing.assert_close(got, fused_linear(x, weight, backend=backend), rtol=0, atol=0, equal_nan=True)
    assert not got[1].isfinite().any()


@each_level
def test_other_calls_read_the_weight(backend: str) -> None:
    """Many rows, another dtype of x, other backends, gradients: as if there were no packed weight."""
    packed, exact_weight = weight_of(48, 64, 4)
    weight = exact_weight.bfloat16()
    wrong = torch.full_like(packed, 0xFF)  # NaN wherever it is read
    for x in (normal(1, 9, 64, dtype=torch.bfloat16), normal(1, 1, 64), normal(1, 1, 64, dtype=torch.float16)):
        got = fused_linear(x, weight, packed=wrong, backend=backend)
        assert torch.equal(got, fused_linear(x, weight, backend=backend))
    x = normal(1, 1, 64, dtype=torch.bfloat16)
    assert torch.equal(fused_linear(x, weight, packed=wrong, backend="ref"), fused_linear(x, weight, backend="ref"))
    grads = []
    for given in (None, packed):
        leaf = x.clone().requires_grad_()
        fused_linear(leaf, weight, packed=given, backend=backend).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@needs_library
def test_opcheck() -> None:
    packed, weight = weight_of(32, 64, 4)
    x = normal(1, 1, 64, dtype=torch.bfloat16)
    args = (x, weight.bfloat16(), packed, None, EPS, None, False, None, "cpu")
    torch.library.opcheck(torch.ops.mc.fused_linear.default, args)


def test_what_does_not_fit_is_refused() -> None:
    packed, exact_weight = weight_of(48, 64, 4)
    weight, x = exact_weight.bfloat16(), normal(1, 1, 64, dtype=torch.bfloat16)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"packed": packed.int()}, TypeError, "packed: expected dtype uint8"),
        ({"packed": packed[:2]}, ValueError, "packed: expected shape [3, 2, 384], got"),
        ({"packed": packed[..., :383]}, ValueError, "packed: expected shape [3, 2, 384], got"),
        ({"packed": packed[0]}, ValueError, "packed: expected 3 dimensions"),
        ({"packed": packed.transpose(0, 1).contiguous().transpose(0, 1)}, ValueError, "packed: expected a contiguous"),
        ({"weight": weight.half()}, TypeError, "weight: expected dtype bfloat16, float32"),
        ({"weight": weight[:, :60], "x": x[:, :60]}, ValueError, "a multiple of 32 elements, got 60"),
        ({"swiglu": True}, ValueError, "packed: expected a multiple of 32 rows with swiglu, got 48"),
    ]
    for changes, error, words in cases:
        with pytest.raises(error) as caught:
            fused_linear(**{"x": x, "weight": weight, "packed": packed} | changes)
        assert words in str(caught.value), str(caught.value)
    codes, scale, offset = parts(16, 64, 4)
    for call, error, words in [
        (lambda: pack_weight(codes.int(), scale), TypeError, "codes: expected dtype uint8"),
        (lambda: pack_weight(codes[:, :40], scale), ValueError, "a multiple of 32 elements, got 40"),
        (lambda: pack_weight(codes + 1, scale), ValueError, "codes: expected 0..15, got 16"),
        (lambda: pack_weight(codes, scale[:, :1]), ValueError, "scale: expected shape [16, 2]"),
        (lambda: pack_weight(codes, scale, offset.double()), TypeError, "offset: expected dtype float32"),
        (lambda: pack_weight(codes, scale, bits=5), ValueError, "bits: expected 4 or 8, got 5"),
        (lambda: unpack_weight(packed[0, 0], 48, 64), ValueError, "packed: expected 3 dimensions"),
        (lambda: unpack_weight(packed, 49, 64), ValueError, "packed: expected shape [4, 2, 384]"),
    ]:
        with pytest.raises(error) as caught:
            call()
        assert words in str(caught.value), str(caught.value)


# -- layers of a decoder --------------------------------------------------------------------------------------------

EMBED, FFN, DIMS = 64, 96, 16  # rows of qkv: (4 + 2 * 2) * 16


def packed_layers(bits: int) -> list[LayerWeights]:
    def layer(seed: int) -> LayerWeights:
        shapes = {"qkv": (128, EMBED), "out": (EMBED, 64), "gate_up": (2 * FFN, EMBED), "down": (EMBED, FFN)}
        fields: dict[str, Any] = dict.fromkeys(LayerWeights._fields)
        for i, (name, shape) in enumerate(shapes.items()):
            packed, exact = weight_of(*shape, bits, seed=seed + i)
            fields[name] = exact.bfloat16()
            fields[f"{name}_packed"] = PackedWeight.beside(fields[name], packed)
        for i, name in enumerate(("attention_norm", "ffn_norm")):
            fields[name] = (1 + normal(seed + 10 + i, EMBED, std=0.2)).bfloat16()
        return LayerWeights(**fields)

    return [layer(100 * n) for n in range(3)]


def one_entry() -> Step:
    step = Step(torch.bfloat16, DIMS, batch=1, length=1)
    step.x = normal(1, 1, 1, EMBED, dtype=torch.bfloat16)
    return step


def by_ops(layers: list[LayerWeights]) -> Tensor:
    """As `one_by_one`, each weight with what stands for it now."""
    packed = {w.data_ptr(): p.of(w) for layer in layers for w, p in layer.packed().values() if p is not None}

    def linear(x: Tensor, weight: Tensor, **rest: Any) -> Tensor:
        return fused_linear(x, weight, packed=packed.get(weight.data_ptr()), **rest)

    return one_by_one(layers, one_entry(), rope(DIMS, "half-split"), linear=linear)[0]


def by_layers(call: DecoderLayers) -> Tensor:
    step = one_entry()
    return call(step.x, step.positions, step.cache)


@each_level
@each_bits
def test_decoder_layers_read_packed_weights(backend: str, bits: int) -> None:
    layers = packed_layers(bits)
    call = DecoderLayers(layers, eps=EPS, rope=rope(DIMS, "half-split"))
    assert torch.equal(by_layers(call), by_ops(layers))
    plain_layers = [w._replace(qkv_packed=None, out_packed=None, gate_up_packed=None, down_packed=None) for w in layers]
    dense = by_layers(DecoderLayers(plain_layers, eps=EPS, rope=rope(DIMS, "half-split")))
    assert not torch.equal(by_layers(call), dense)
    assert (by_layers(call).double() - dense.double()).norm() < 0.02 * dense.double().norm()


@each_level
@each_bits
def test_a_packed_head_serves_the_logits(backend: str, bits: int) -> None:
    packed, exact = weight_of(40, EMBED, bits)
    head = exact.bfloat16()
    call = DecoderLayers(packed_layers(bits), eps=EPS, rope=rope(DIMS, "half-split"))
    hidden, logits = by_layers(call), torch.full((1, 40), float("nan"), dtype=torch.bfloat16)
    step = one_entry()
    call(step.x, step.positions, step.cache, head=head, head_packed=packed, logits=logits)
    assert torch.equal(logits, fused_linear(hidden[:, -1], head, packed=packed))
    assert not torch.equal(logits, fused_linear(hidden[:, -1], head))


@needs_library
@pytest.mark.parametrize("change", ["in place", "another storage"])
def test_a_packed_weight_ends_with_its_weight(change: str) -> None:
    layers = packed_layers(4)
    call = DecoderLayers(layers, eps=EPS, rope=rope(DIMS, "half-split"))
    before, packed = by_layers(call), layers[1].down_packed
    assert packed is not None
    if change == "in place":
        layers[1].down.mul_(-1.0)
    else:
        layers[1].down.data = -layers[1].down
    assert packed.of(layers[1].down) is None
    after = by_layers(call)
    assert torch.equal(after, by_ops(layers))
    assert not torch.equal(after, before)


def test_no_packed_weight_beside_what_cannot_be_watched() -> None:
    packed, weight = weight_of(32, 64, 4)
    with torch.inference_mode():
        made_here = weight.bfloat16()
    with pytest.raises(ValueError, match="made outside of inference mode"):
        PackedWeight.beside(made_here, packed)
    with pytest.raises(ValueError, match="packed: expected shape"):
        PackedWeight.beside(weight[:16].bfloat16(), packed)


@needs_library
def test_addresses_are_checked_by_the_library() -> None:
    packed, exact = weight_of(32, 64, 4)
    weight, x, out = exact.bfloat16(), torch.ones(1, 64, dtype=torch.bfloat16), torch.zeros(1, 32, dtype=torch.bfloat16)
    library = native.library()

    def call(given: Any, w: Tensor = weight) -> None:
        library.fused_linear(native.view(x), native.view(w), None, 0.0, None, False, None, native.view(out), 1, given)

    for given, words in [
        ((packed.data_ptr() + 2, 4), "packed: expected an address that is a multiple of 4"),
        ((packed.data_ptr(), 5), "packed: expected codes of 4 or 8 bits, got 5"),
        ((packed.data_ptr(),), "packed: expected \\(address, bits\\)"),
    ]:
        with pytest.raises(ValueError, match=words):
            call(given)
    with pytest.raises(TypeError, match="packed: expected a weight of bf16 or f32, got dtype code 1"):
        call((packed.data_ptr(), 4), exact.half())
    inside = packed.view(-1)[384:448].view(torch.bfloat16)[None]
    with pytest.raises(ValueError, match="out: expected memory apart from packed"):
        library.fused_linear(native.view(x), native.view(weight), None, 0.0, None, False, None, native.view(inside), 1,
                             (packed.data_ptr(), 4))  # fmt: skip
    assert not out.any()


@needs_library
def test_keys_in_the_cache_are_of_the_packed_weight() -> None:
    layers, step = packed_layers(4), one_entry()
    cache = step.cache._replace(k=step.cache.k[:1], v=step.cache.v[:1])
    DecoderLayers(layers[:1], eps=EPS, rope=None)(step.x, step.positions, cache)
    w, p = layers[0].packed()["qkv"]
    assert p is not None
    qkv = fused_linear(step.x, w, packed=p.of(w), norm=layers[0].attention_norm, eps=EPS)
    slot = int(step.cache.slots[0, 0])
    assert torch.equal(step.cache.k[0, 0, :, slot], qkv[0, 0, 64:96].view(2, DIMS))
    step.check()
