"""Small checkpoints that are quantized already, made by the libraries that own the formats where these run on a CPU."""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

CONFIG = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip


def small_llama(
    directory: Path, dtype: torch.dtype = torch.float32, family: str | None = None, **changes: object
) -> Path:
    """Write a tiny random Llama, or a tiny mixture of experts of a family."""
    torch.manual_seed(0)
    if family:
        from helpers.mixtures import build_family

        build_family(family).to(dtype).save_pretrained(directory)
        return directory
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**CONFIG, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
    model.to(dtype).save_pretrained(directory)
    return directory


def rewrite(directory: Path, tensors: dict[str, torch.Tensor], settings: object = None) -> Path:
    """Give a directory other tensors, and its config quantization settings."""
    save_file({name: x.contiguous() for name, x in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config.pop("quantization_config", None)
    (directory / "config.json").write_text(
        json.dumps({**config, "quantization_config": settings} if settings else config)
    )
    return directory


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def is_linear(name: str) -> bool:
    return name.endswith("proj.weight")


def fp8(
    directory: Path,
    block: tuple[int, int] = (32, 32),
    scale_dtype: torch.dtype = torch.float32,
    family: str | None = None,
) -> Path:
    """Write a model in FP8 with a scale for each block, as transformers and DeepSeek do."""
    tensors, size = tensors_of(small_llama(directory, torch.bfloat16, family)), block
    for name in [*filter(is_linear, tensors)]:
        W = tensors[name].float()
        N, K = W.shape
        scale = torch.zeros(-(-N // size[0]), -(-K // size[1]))
        for i, rows in enumerate(W.split(size[0])):
            for j, part in enumerate(rows.split(size[1], 1)):
                scale[i, j] = part.abs().max() / 448
        scale = scale.log2().ceil().exp2() if scale_dtype == torch.float8_e8m0fnu else scale.to(scale_dtype).float()
        spread = scale.repeat_interleave(size[0], 0)[:N].repeat_interleave(size[1], 1)[:, :K]
        tensors |= {name: (W / spread).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale.to(scale_dtype)}
    settings = {"quant_method": "fp8", "weight_block_size": [*size], "fmt": "e4m3", "activation_scheme": "dynamic"}
    return rewrite(directory, tensors, settings)


def compressed(directory: Path, format: str, dtype: torch.dtype = torch.bfloat16, **weights: object) -> Path:
    """Write a Llama in a format of compressed-tensors, compressed by that library."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=format)
    args, tensors = scheme.weights, tensors_of(small_llama(directory, dtype))
    compressor = BaseCompressor.get_value_from_registry(format)
    for name in [*filter(is_linear, tensors)]:
        W = tensors.pop(name)
        size = {"group": args.group_size, "tensor_group": args.group_size, "channel": W.shape[1]}.get(
            str(args.strategy)
        )
        groups = W.float().unflatten(1, (-1, size)) if size else W.float().reshape(1, 1, -1)
        low, high = groups.amin(-1), groups.amax(-1)
        state = {"weight": W}
        if str(args.strategy) == "tensor_group":
            state["weight_global_scale"] = (448 * 6 / W.float().abs().max()).reshape(1)
            scale, zero_point = calculate_qparams(low, high, args, global_scale=state["weight_global_scale"])
        else:
            scale, zero_point = calculate_qparams(low, high, args)
        state["weight_scale"] = scale.to(torch.float32 if "fp4" in format else dtype)
        if not args.symmetric:
            state["weight_zero_point"] = zero_point.to(torch.int8)
        done = compressor.compress(state, scheme)
        tensors |= {f"{name.removesuffix('weight')}{part}": x for part, x in done.items() if x is not None}
    config = QuantizationConfig(config_groups={"group_0": scheme}, format=format, ignore=["lm_head"],
                                quantization_status="compressed")  # fmt: skip
    settings = {**json.loads(config.model_dump_json()), "quant_method": "compressed-tensors"}
    return rewrite(directory, tensors, settings)


def mxfp4_experts(directory: Path) -> Path:
    """Write a tiny gpt-oss with its experts in MXFP4, as OpenAI publishes it."""
    from helpers.mixtures import build_family

    model = build_family("gpt_oss").to(torch.bfloat16)
    model.save_pretrained(directory)
    tensors = {}
    for name, x in tensors_of(directory).items():
        if name.endswith(("gate_up_proj", "down_proj")):
            codes, scales = to_mxfp4(x.float().transpose(1, 2))
            tensors |= {f"{name}_blocks": codes.unflatten(-1, (-1, 16)), f"{name}_scales": scales}
        else:
            tensors[name] = x
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return rewrite(directory, tensors, settings)


def to_mxfp4(W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes, two to a byte, and E8M0 scales by the rule of the OCP specification."""
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8

    groups = W.unflatten(-1, (-1, 32))
    exponent = groups.abs().amax(-1).log2().floor() - 2
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    t = groups / exponent.exp2()[..., None]
    values = levels[(t.abs()[..., None] - levels).abs().argmin(-1)] * t.sign()
    packed = pack_fp4_to_uint8(values.flatten(-2).flatten(0, -2))
    return packed.view(*W.shape[:-1], -1), (exponent + 127).to(torch.uint8)


def pack_rows(q: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Pack unsigned integers [R, C] along their columns into int32 [R, C · bits / 32], the first one lowest."""
    each = 32 // bits
    groups = q.long().unflatten(1, (-1, each))[..., list(order or range(each))]
    words = (groups << (bits * torch.arange(each))).sum(-1)
    return (words - ((words >> 31) << 32)).to(torch.int32)


def gptq(directory: Path, bits: int = 4, group: int = 32, act_order: bool = False, version: str = "gptq") -> Path:
    """Write a Llama in GPTQ's layout, which stores zero points - 1 in its first version."""
    tensors = tensors_of(small_llama(directory, torch.float16))
    for name in [*filter(is_linear, tensors)]:
        W, path = tensors.pop(name).float(), name.removesuffix(".weight")
        columns = W.shape[1]
        g_idx = torch.arange(columns) // group
        g_idx = g_idx[torch.randperm(columns, generator=torch.Generator().manual_seed(0))] if act_order else g_idx
        scales = torch.stack([W[:, g_idx == g].abs().amax(1) for g in range(columns // group)]) / ((1 << bits - 1) - 1)
        scales, zeros = scales.half(), torch.full_like(scales, 1 << bits - 1)
        q = (W.T / scales.float()[g_idx] + zeros[g_idx]).round().clamp(0, (1 << bits) - 1)
        tensors[f"{path}.qweight"] = pack_rows(q.T, bits).T
        tensors[f"{path}.qzeros"] = pack_rows(zeros - int(version == "gptq"), bits)
        tensors |= {f"{path}.scales": scales, f"{path}.g_idx": g_idx.to(torch.int32)}
    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order, "sym": True,
                "checkpoint_format": version}  # fmt: skip
    return rewrite(directory, tensors, settings)


def awq(directory: Path, group: int = 32) -> Path:
    """Write a Llama in AWQ's layout."""
    tensors, order = tensors_of(small_llama(directory, torch.float16)), (0, 2, 4, 6, 1, 3, 5, 7)
    for name in [*filter(is_linear, tensors)]:
        W, path = tensors.pop(name).float(), name.removesuffix(".weight")
        groups = W.unflatten(1, (-1, group))
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = ((high - low) / 15).half()
        zeros = (-low / scales.float()).round().clamp(0, 15)
        q = (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 15).flatten(1)
        tensors[f"{path}.qweight"], tensors[f"{path}.qzeros"] = (pack_rows(x.T, 4, order) for x in (q, zeros))
        tensors[f"{path}.scales"] = scales.T
    settings = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return rewrite(directory, tensors, settings)


def modelopt(directory: Path) -> Path:
    """Write a Llama in NVFP4 as ModelOpt does, from compressed-tensors' own NVFP4."""
    compressed(directory, "nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16)
    tensors = tensors_of(directory)
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        weight = name.removesuffix("_packed")
        tensors[weight] = tensors.pop(name)
        tensors[f"{weight}_scale_2"] = 1 / tensors.pop(f"{weight}_global_scale").reshape(())
    settings = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
    return rewrite(directory, tensors, settings)


def gguf_file(directory: Path, kinds: tuple[str, ...] = ("Q4_0", "Q8_0", "Q4_1")) -> Path:
    """Write a Llama as GGUF beside its config, its linears in some kinds of blocks by turns."""
    import gguf

    tensors, path = tensors_of(small_llama(directory)), directory / "model.gguf"
    config = json.loads((directory / "config.json").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    for number, (name, W) in enumerate(sorted(tensors.items())):
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads:  # as llama.cpp orders rows for its rotary embedding
            W = W.view(heads, 2, -1, W.shape[1]).transpose(1, 2).reshape(W.shape)
        kind = getattr(gguf.GGMLQuantizationType, kinds[number % len(kinds)]) if is_linear(name) else None
        data = W.numpy() if kind is None else gguf.quants.quantize(W.contiguous().numpy(), kind)
        writer.add_tensor(names.get_name(name.removesuffix(".weight")) + ".weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (directory / "model.safetensors").unlink()
    return path
