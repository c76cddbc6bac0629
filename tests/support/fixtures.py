"""The architecture matrix: small random models of every kind that the Stack must open, built from their configs.

``save(name, folder)`` writes a Hugging Face folder (weights, config, tokenizer), which is then loaded by the real
``from_pretrained``, without network. ``native(...)`` builds TransformerLens' own model.
"""

from pathlib import Path

import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformer_lens import TransformerBridge, TransformerBridgeConfig
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from surgery.models import building

N_LAYERS, D_MODEL, N_HEADS, D_MLP, N_VOCAB, N_CONTEXT = 4, 32, 4, 64, 96, 64
WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(N_VOCAB - 4))]

_rope = dict(
    hidden_size=D_MODEL,
    intermediate_size=D_MLP,
    num_hidden_layers=N_LAYERS,
    num_attention_heads=N_HEADS,
    num_key_value_heads=2,
    max_position_embeddings=N_CONTEXT,
    vocab_size=N_VOCAB,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_gpt2 = dict(
    n_embd=D_MODEL,
    n_layer=N_LAYERS,
    n_head=N_HEADS,
    n_positions=N_CONTEXT,
    vocab_size=N_VOCAB,
    bos_token_id=1,
    eos_token_id=2,
)
_alternating = ["sliding_attention", "full_attention"] * (N_LAYERS // 2)

CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(**_gpt2),
    "gptj": lambda: transformers.GPTJConfig(**_gpt2, rotary_dim=4),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        **{k: v for k, v in _rope.items() if k != "num_key_value_heads"}, use_parallel_residual=True
    ),
    "opt": lambda: transformers.OPTConfig(
        hidden_size=D_MODEL,
        word_embed_proj_dim=D_MODEL,
        ffn_dim=D_MLP,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        max_position_embeddings=N_CONTEXT,
        vocab_size=N_VOCAB,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "llama": lambda: transformers.LlamaConfig(**_rope),
    "mistral": lambda: transformers.MistralConfig(**_rope, sliding_window=5),
    "qwen2": lambda: transformers.Qwen2Config(**_rope),
    "qwen3": lambda: transformers.Qwen3Config(**_rope, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(
        **_rope, head_dim=8, sliding_window=5, layer_types=_alternating, query_pre_attn_scalar=8
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_rope, head_dim=8, sliding_window=5, layer_types=_alternating, query_pre_attn_scalar=8
    ),
    "phi3": lambda: transformers.Phi3Config(**_rope),
    "olmo2": lambda: transformers.Olmo2Config(**_rope),
    "mixtral": lambda: transformers.MixtralConfig(**_rope, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **_rope, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=D_MLP // 2
    ),
}
ARCHITECTURES = tuple(CONFIGS)
NATIVE = ("native-ln", "native-rms", "native-gated", "native-attention-only")


def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer that knows ``w0 w1 w2 ...`` and puts ``<bos>`` in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def hugging_face(name: str, seed: int = 0) -> PreTrainedModel:
    """A random model whose layers all matter: every parameter, even norm scales and biases, is off its default."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.08))
    return model.eval()


def save(name: str, folder: Path, seed: int = 0) -> Path:
    """Write ``name`` with its tokenizer as a Hugging Face directory and return the path."""
    hugging_face(name, seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def native(name: str = "native-ln", seed: int = 0, dtype: torch.dtype = torch.float32) -> TransformerBridge:
    """TransformerLens' own model: no Hugging Face, no tokenizer."""
    kind = {
        "native-ln": dict(normalization_type="LN", positional_embedding_type="standard", act_fn="gelu_new"),
        "native-rms": dict(normalization_type="RMS", positional_embedding_type="rotary", act_fn="relu"),
        "native-gated": dict(
            normalization_type="RMS", final_rms=True, gated_mlp=True, positional_embedding_type="rotary", act_fn="silu"
        ),
        "native-attention-only": dict(normalization_type="LN", attn_only=True, act_fn="gelu"),
    }[name]
    config = TransformerBridgeConfig(
        n_layers=N_LAYERS,
        d_model=D_MODEL,
        n_ctx=N_CONTEXT,
        d_head=D_MODEL // N_HEADS,
        n_heads=N_HEADS,
        d_mlp=D_MLP,
        d_vocab=N_VOCAB,
        seed=seed,
        device="cpu",
        dtype=dtype,
        **kind,
    )
    with building.quickly():
        model = TransformerBridge.boot_native(config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


class ThroughoutDouble(TorchFunctionMode):
    """Context manager: double precision stays double where norms and softmaxes of many models go through float32."""

    def __torch_function__(self, called, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if called is torch.Tensor.float or (
                called is torch.Tensor.to and torch.float32 in (*args, *kwargs.values())
            ):
                return args[0]
            if kwargs.get("dtype") == torch.float32:
                kwargs["dtype"] = torch.float64
        return called(*args, **kwargs)
