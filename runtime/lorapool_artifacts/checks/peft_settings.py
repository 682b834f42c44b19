"""Classifies each setting of peft's LoraConfig for serving: supported, harmless, or refused with reason and remedy.

Pure data. A test compares the tables with the fields, initializations and adapter types of the installed peft, so that
an upgrade that adds one fails there, not in a user's responses.
"""

from __future__ import annotations

from dataclasses import dataclass

LORA = "LORA"
GENERATES = (None, "", "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")
"""Values of task_type of adapters without an output layer of their own."""
MLX = frozenset({"fine_tune_type", "lora_parameters", "lora_layers", "num_layers"})
"""Settings by which mlx's adapter_config.json is recognised."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an adapter is refused, and what its owner can do."""

    why: str
    """Reason, as a part of a sentence about the setting."""
    remedy: str


def _again(without: str) -> str:
    return f"train it again {without}"


HARMLESS = {
    "auto_mapping": "class names of the trainer's model; nothing is imported from them",
    "corda_config": "initialization of training; init_lora_weights tells whether it changed the base",
    "eva_config": "initialization of training; the ranks that it chose are in rank_pattern",
    "fan_in_fan_out": "affects merging; the kind of the base's layer decides how it computes",
    "inference_mode": "affects training only",
    "loftq_config": "initialization of training; init_lora_weights tells whether it changed the base",
    "lora_dropout": "affects training only",
    "merge_weights": "how the first versions of peft ran an adapter, not what it computes",
    "lora_ga_config": "initialization of training; init_lora_weights tells whether it changed the base",
    "megatron_core": "names a module for megatron_config, which is refused anyway",
    "modules_to_save": "whole matrices are tensors of the file, each of which is checked",
    "peft_version": "information",
    "qalora_group_size": "affects use_qalora only, which is refused anyway",
    "revision": "information about the base it was trained on",
    "runtime_config": "machine of the training; peft does not save it",
    "task_type": "wrapper of the training; those with an output layer of their own are refused by name",
    "transformers_version": "information",
    "unsloth_version": "information",
    "velora_config": "compresses activations kept for training; serving computes plain LoRA",
}
"""Setting → why ignoring it does not change results."""

REFUSED = {
    "alora_invocation_tokens": Refusal(
        "activated LoRA, which changes only the tokens after its invocation", _again("without alora_invocation_tokens")
    ),
    "arrow_config": Refusal(
        "Arrow routing, which mixes several adapters per token", "serve each of its adapters by itself"
    ),
    "enable_lora": Refusal(
        "LoRA on parts of a fused layer, as the first version of peft stored it",
        _again("with a current version of peft"),
    ),
    "kasa_config": Refusal(
        "KaSA, which removes the smallest singular values of the base's weights", _again("without KaSA")
    ),
    "layer_replication": Refusal(
        "replicated layers of the base, so it belongs to a deeper model", _again("without layer_replication")
    ),
    "lora_bias": Refusal("trained biases in LoRA layers", _again("with lora_bias=False")),
    "megatron_config": Refusal("Megatron's parallel layers", _again("on the transformers model")),
    "monteclora_config": Refusal(
        "MonteCLoRA, which samples its weights at every step", _again("without monteclora_config")
    ),
    "trainable_token_indices": Refusal(
        "embeddings of trained tokens, which all adapters share", _again("without trainable_token_indices")
    ),
    "use_bdlora": Refusal("block-diagonal LoRA, whose matrices are stored in blocks", _again("without use_bdlora")),
    "use_dora": Refusal("DoRA, which rescales the base's own weights", _again("with use_dora=False")),
    "use_qalora": Refusal("QALoRA, which pools the inputs of a quantized base", _again("with use_qalora=False")),
}
"""Setting → why an adapter that uses it does not compute plain LoRA."""

INITIALIZATIONS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
"""Values of init_lora_weights, besides true and false, that leave the base as it is."""

_MOVES_WEIGHTS = Refusal(
    "moves a part of the base's weights into the adapter before training, so it is wrong on the original base",
    "convert the adapter with save_pretrained(path_initial_model_for_weight_conversion=...)",
)
REFUSED_INITIALIZATIONS = {
    "pissa": _MOVES_WEIGHTS,  # also pissa_niter_<n>
    "olora": _MOVES_WEIGHTS,
    "corda": _MOVES_WEIGHTS,
    "lora_ga": _MOVES_WEIGHTS,
    "loftq": Refusal(
        "trains against a quantized copy of the base's weights, so it is wrong on the original base",
        _again("with init_lora_weights=True on the original base"),
    ),
}

_CONVERT = "convert it with peft's save_as_lora(), or train with peft's LoraConfig"
_TRAIN = "train with peft's LoraConfig"
_PROMPT = "puts trained vectors into the prompt or the attention's cache"

KINDS = {
    "ADALORA": Refusal("redistributes rank between layers and stores singular values next to its matrices", _TRAIN),
    "ADAMSS": Refusal("trains in subspaces of the base's weights", _TRAIN),
    "ADAPTION_PROMPT": Refusal(_PROMPT, _TRAIN),
    "BEFT": Refusal("trains biases of the base", _TRAIN),
    "BOFT": Refusal("rotates the base's weights", _TRAIN),
    "C3A": Refusal("adds circular convolutions", _CONVERT),
    "CARTRIDGE": Refusal(_PROMPT, _TRAIN),
    "CPT": Refusal(_PROMPT, _TRAIN),
    "DEFT": Refusal("projects the base's weights", _TRAIN),
    "DELORA": Refusal("normalises its matrices", _CONVERT),
    "FOURIERFT": Refusal("stores its change as frequencies", _CONVERT),
    "FROD": Refusal("trains in a basis shared by all layers", _TRAIN),
    "GLORA": Refusal("rescales the base's weights and biases", _TRAIN),
    "GRALORA": Refusal("splits each matrix into blocks", _CONVERT),
    "HIRA": Refusal("multiplies the base's weights", _TRAIN),
    "HRA": Refusal("reflects the base's weights", _TRAIN),
    "IA3": Refusal("scales the base's activations", _TRAIN),
    "LILY": Refusal("shares its matrices between layers", _TRAIN),
    "LN_TUNING": Refusal("trains the base's normalisation layers", _TRAIN),
    "LOHA": Refusal("multiplies two low-rank products element-wise", _CONVERT),
    "LOKR": Refusal("adds Kronecker products", _CONVERT),
    "MISS": Refusal("adds sums over shards of the input", _CONVERT),
    "MULTITASK_PROMPT_TUNING": Refusal(_PROMPT, _TRAIN),
    "OFT": Refusal("rotates the base's weights", _TRAIN),
    "OSF": Refusal("changes the base's weights in their singular directions", _TRAIN),
    "PEANUT": Refusal("derives its change from the base's weights", _TRAIN),
    "POLY": Refusal("mixes several adapters by task", _TRAIN),
    "PREFIX_TUNING": Refusal(_PROMPT, _TRAIN),
    "PROMPT_TUNING": Refusal(_PROMPT, _TRAIN),
    "PSOFT": Refusal("rotates the base's weights in a subspace", _CONVERT),
    "PVERA": Refusal("samples its vectors at every step", _TRAIN),
    "P_TUNING": Refusal(_PROMPT, _TRAIN),
    "RANDLORA": Refusal("trains in random bases shared by all layers", _CONVERT),
    "ROAD": Refusal("rotates the base's activations", _TRAIN),
    "SHADOW": Refusal("runs a second, trained model next to the base", _TRAIN),
    "SHIRA": Refusal("changes single weights of the base", _TRAIN),
    "SUPERTUNING": Refusal("changes single weights of the base", _TRAIN),
    "TINYLORA": Refusal("trains in random bases shared by all layers", _CONVERT),
    "TRAINABLE_TOKENS": Refusal("trains embeddings, which all adapters share", _TRAIN),
    "UNILORA": Refusal("stores one vector for all layers", _CONVERT),
    "VBLORA": Refusal("stores a bank of vectors for all layers", _CONVERT),
    "VERA": Refusal("trains in random bases shared by all layers", _CONVERT),
    "WAVEFT": Refusal("stores its change as wavelets", _CONVERT),
    "XLORA": Refusal("mixes several adapters per token", _TRAIN),
}
"""peft_type → how such an adapter differs from LoRA."""

TABLES = {
    "Settings that are refused": REFUSED,
    "Values of init_lora_weights that are refused": REFUSED_INITIALIZATIONS,
    "Other kinds of adapters (peft_type)": KINDS,
}

HARMLESS_TENSORS = ("lora_velora_embed",)
"""Last parts of the names of tensors that only training uses."""

TENSORS = (
    (r"\.lora_[ab](\.weight)?$", "mlx-names"),
    (r"lora_magnitude_vector", "dora"),
    (r"lora_diag", "kasa"),
    (r"lora_monteclora", "monteclora"),
    (r"token_adapter", "trained-tokens"),
    (r"\bv_head\b", "value-head"),
    (r"\b(score|classifier|qa_outputs)\.", "output-head"),
    (r"modules_to_save", "trained-module"),
    (r"\.bias$", "tensor-bias"),
    (r"\.weight$", "trained-module"),
)
"""(expression for a tensor's name, why such a tensor cannot be ignored: a key of `causes`), the specific ones first."""
