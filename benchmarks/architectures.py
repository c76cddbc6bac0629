"""Which architectures open exactly: a small random model of every causal one that TransformerLens lists.

    python benchmarks/architectures.py [--write]

Each is built from its configuration, saved, and opened from the folder like any other model. "Exact" means that every
check of ``Stack.checks`` passes on prompts of 64 random tokens, with padding on both sides, and with sliding windows
and attention chunks (of 8 tokens) exceeded; the figure is the largest difference of all checks. Anything else must be
refused in one sentence. ``--write`` puts the table into docs/architectures.md.
"""

import argparse
import inspect
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

import surgery
from surgery.models.loading import quiet

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
N_LAYERS, D_MODEL, N_HEADS, D_MLP, N_VOCAB, N_CONTEXT = 4, 32, 4, 64, 96, 128

# What configurations call the sizes of a model; each takes the ones that it has.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size"), D_MODEL),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), N_LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads", "num_heads"), N_HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "expert_ffn_hidden_size"), D_MLP),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), D_MLP // 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"), N_CONTEXT),
    "vocab_size": N_VOCAB,
    "head_dim": D_MODEL // N_HEADS,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "local_attention", "window_size"), 8),
    "query_pre_attn_scalar": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_latent = dict(  # DeepSeek's attention through a latent vector
    q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, num_key_value_heads=N_HEADS
)
# Architectures whose sizes depend on one another, and the variants of one that differ in structure.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "FalconForCausalLM": {
        "7B: one norm": dict(new_decoder_architecture=False, parallel_attn=True, alibi=False, bias=False),
        "40B: two norms": dict(new_decoder_architecture=True, alibi=False, bias=False, num_ln_in_parallel_attn=2),
        "11B: new, one norm": dict(new_decoder_architecture=True, alibi=False, num_ln_in_parallel_attn=1),
        "RW: ALiBi, serial": dict(
            alibi=True,
            parallel_attn=False,
            multi_query=False,
            bias=True,
            new_decoder_architecture=False,
            num_kv_heads=N_HEADS,
        ),
    },
    "PhiForCausalLM": {"plain": {}, "qk-layernorm": dict(qk_layernorm=True)},
    "GPTNeoXForCausalLM": {
        "parallel": {},
        "serial": dict(use_parallel_residual=False),
        "no attention bias": dict(attention_bias=False),
    },
    "GPTNeoForCausalLM": {"global and local": dict(attention_types=[[["global", "local"], N_LAYERS // 2]])},
    "GPTBigCodeForCausalLM": {"multi-query": dict(multi_query=True), "multi-head": dict(multi_query=False)},
    "GPTJForCausalLM": {"": dict(rotary_dim=4)},
    "CodeGenForCausalLM": {"": dict(rotary_dim=4)},
    "StableLmForCausalLM": {
        "serial": {},
        "parallel": dict(use_parallel_residual=True),
        "qk-layernorm": dict(qk_layernorm=True),
    },
    "OPTForCausalLM": {"": {}, "350M: norm after": dict(do_layer_norm_before=False)},
    "BloomForCausalLM": {"": {}},
    "MptForCausalLM": {"": {}},
    "GemmaForCausalLM": {"": dict(num_key_value_heads=1)},
    "Gemma2ForCausalLM": {"": dict(layer_types=["sliding_attention", "full_attention"] * 2)},
    "Gemma3ForCausalLM": {"": dict(layer_types=["sliding_attention", "full_attention"] * 2)},
    "MistralForCausalLM": {"window": {}, "no window": dict(sliding_window=None)},
    "Qwen2ForCausalLM": {"": {}, "window": dict(use_sliding_window=True, max_window_layers=2)},
    "DeepseekV2ForCausalLM": {"": dict(_latent, n_group=1, topk_group=1)},
    "DeepseekV3ForCausalLM": {"": dict(_latent, n_group=1, topk_group=1, first_k_dense_replace=1)},
    "Glm4MoeLiteForCausalLM": {"": dict(_latent, n_group=1, topk_group=1)},
    "YoutuForCausalLM": {"": dict(_latent)},
    "BertLMHeadModel": {"encoder": {}, "decoder": dict(is_decoder=True)},
    "Lfm2MoeForCausalLM": {"": dict(layer_types=["full_attention"] * N_LAYERS)},
    "Lfm2ForCausalLM": {"attention only": dict(layer_types=["full_attention"] * N_LAYERS), "hybrid": {}},
    **{key: {"": dict(mamba_n_heads=8, mamba_d_head=8)} for key in ("BambaForCausalLM", "GraniteMoeHybridForCausalLM")},
    "Mamba2ForCausalLM": {"": dict(num_heads=8, head_dim=8)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/architectures.md")
    parser.add_argument("--only", default="", help="only architectures whose name contains this")
    arguments = parser.parse_args()
    rows = []
    for name in sorted(SUPPORTED_ARCHITECTURES):
        if ("CausalLM" not in name and "LMHead" not in name) or arguments.only not in name:
            continue
        for variant, options in VARIANTS.get(name, {"": {}}).items():
            rows.append((name, variant, *outcome(name, options)))
            print(*rows[-1], sep=" | ", flush=True)
    exact = sum(result == "exact" for _, _, result, _ in rows)
    refused = sum(result == "refused" for _, _, result, _ in rows)
    summary = (
        f"{len(rows)} models: {exact} exact, {refused} refused, {len(rows) - exact - refused} could not be built.\n"
    )
    print(summary)
    if arguments.write:
        lines = ["| architecture | variant | opens | largest difference, or why not |", "|---|---|---|---|"]
        lines += [f"| {name} | {variant} | {result} | {what} |" for name, variant, result, what in rows]
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(before + BEGIN + summary + "\n" + "\n".join(lines) + "\n" + END + rest.split(END)[1])


def outcome(name: str, options: dict[str, Any]) -> tuple[str, str]:
    """("exact", the largest difference), ("refused", the sentence), or ("not built", what stood in the way)."""
    try:
        model = small(name, options)
    except Exception as error:
        return "not built", f"{type(error).__name__}: {sentence(error)}"
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with quiet():
                model.save_pretrained(folder)
        except Exception as error:
            return "not built", f"{type(error).__name__}: {sentence(error)}"
        try:
            checks = surgery.Stack(folder).checks(length=64)
        except ValueError as error:
            return "refused", sentence(error).replace(folder, "it")
        except Exception as error:
            return "TRACEBACK", f"{type(error).__name__}: {sentence(error)}"
    failed = checks[~checks["passed"]]
    if len(failed):
        return "WRONG", "; ".join(f"{row.check}: {row.largest_difference:.1e}" for row in failed.itertuples())
    return "exact", f"{checks['largest_difference'].max():.1e}"


def sentence(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).replace("|", "/")[:240]


def small(name: str, options: dict[str, Any]) -> PreTrainedModel:
    """A small random model of an architecture, in which every parameter matters."""
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise LookupError("transformers has no such class (its code lies with the weights)")
    config_class: type[PreTrainedConfig] = model_class.config_class
    known = set(inspect.signature(config_class.__init__).parameters) | set(vars(config_class()))
    known |= set(getattr(config_class, "attribute_map", {}))
    config = config_class(**{key: value for key, value in SMALL.items() if key in known} | options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if sum(weight.numel() for weight in model.parameters()) > 20_000_000:
        raise LookupError("its configuration has sizes of its own; no small model was built")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.05))
    return model.eval()


if __name__ == "__main__":
    main()
