"""Why an adapter is refused: one sentence and one remedy for each cause.

Every refusal of an adapter's files, settings and tensors is written with this table. `docs/reference/refusals.md` is
generated from it, and a test provokes each cause. `peft_settings` holds the words for each setting of peft.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorapool_api.common import FailureReason
from lorapool_artifacts.errors import ArtifactError

_FORMAT = FailureReason.UNSUPPORTED_FORMAT
_MISFIT = FailureReason.INCOMPATIBLE
_DAMAGED = FailureReason.CORRUPT_ARTIFACT

_SAME_SAVE = "Upload adapter_config.json and adapter_model.safetensors of one and the same save_pretrained()."
_UPLOAD_AGAIN = "Upload the original file again."
_ZERO_REMEDY = (
    "Gather the weights while saving: call save_pretrained() with state_dict=accelerator.get_state_dict(model), or set "
    "stage3_gather_16bit_weights_on_model_save in the DeepSpeed config. Run zero_to_fp32.py on an old checkpoint first."
)
_MLX_REMEDY = (
    "Convert it to peft's format: transpose each matrix, name it base_model.model.<module>.lora_A.weight and "
    "…lora_B.weight, and write adapter_config.json with r, lora_alpha (mlx's scale times the rank) and target_modules."
)
_PLAIN_NAMES = "Write plain module names in its place, such as q_proj."
_SHARED = "which all adapters of a base share"


@dataclass(frozen=True, slots=True)
class Cause:
    """Why an adapter is refused. The texts have fields in braces."""

    reason: FailureReason
    sentence: str
    """What was found, without the full stop."""
    remedy: str
    """What the adapter's owner can do, in whole sentences."""


GROUPS: Mapping[str, Mapping[str, Cause]] = {
    "The files": {
        "pickle": Cause(
            _FORMAT,
            "{where} holds its weights as a pickle ({file}), which can run code and is never read",
            "Re-save the {noun} with save_pretrained(safe_serialization=True), and upload {wanted}.",
        ),
        "archive": Cause(
            _FORMAT,
            "{where} holds an archive ({file}), which is never unpacked",
            "Upload {wanted} and its config as plain files.",
        ),
        "sub-folder": Cause(
            FailureReason.SOURCE_NOT_FOUND,
            "{where} itself holds no {wanted}, but folders in it do: {folders}",
            "Name one of them in the source, such as {example}",
        ),
        "sharded-training-state": Cause(
            _FORMAT,
            "{where} holds the training state of several processes ({file}), and no weights of one whole {noun}",
            _ZERO_REMEDY,
        ),
        "sharded-weights": Cause(
            _FORMAT,
            "{where} holds the adapter in several files ({file})",
            "Save it in one: save_pretrained(path, max_shard_size='100GB') writes adapter_model.safetensors.",
        ),
        "mlx": Cause(_FORMAT, "{where} holds an adapter in mlx's format ({file})", _MLX_REMEDY),
        "whole-model": Cause(
            _FORMAT,
            "{where} holds a whole model ({file}), not a LoRA adapter",
            "Save the peft model with save_pretrained() without merging it.",
        ),
        "adapter-for-a-base": Cause(
            _FORMAT,
            "{where} holds a LoRA adapter, not a whole model",
            "Name it in a LoraAdapter, and the model that it was trained on in the BaseModel.",
        ),
        "other-name": Cause(
            _FORMAT,
            "{where} holds {file} but no {wanted}",
            "Upload the {noun} under the name that save_pretrained() gives it.",
        ),
        "no-weights": Cause(
            FailureReason.SOURCE_NOT_FOUND,
            "{where} holds no {wanted} ({count} other files)",
            "Check the source's path, and upload what save_pretrained() writes.",
        ),
        "no-config": Cause(
            _FORMAT,
            "{where} holds {wanted} but no adapter_config.json",
            "Upload both files that peft's save_pretrained() writes.",
        ),
        "base-too-large": Cause(
            FailureReason.TOO_LARGE,
            "{where} is {size} bytes, more than the {bound} allowed",
            "Save the model in bf16, or raise the chart's artifacts.maxBaseBytes.",
        ),
        "link-out": Cause(
            FailureReason.INVALID_SOURCE,
            "{where}: {file} is a symbolic link that leads out of the volume or to nothing",
            "Copy the file itself, or link to a file of the same volume by a relative path.",
        ),
    },
    "The header of the weights": {
        "damaged": Cause(_DAMAGED, "{file} is damaged: {what}", _UPLOAD_AGAIN),
        "too-many-tensors": Cause(
            FailureReason.TOO_LARGE,
            "{file} {what}, more than the {bound} that Lorapool reads; the file is not damaged, this is a bound of "
            "Lorapool's own",
            "Raise LORAPOOL_MAX_TENSORS (now {setting}) in the chart's artifacts.env.",
        ),
        "element-type": Cause(
            _FORMAT, "{file}: tensor {tensor} is stored as {dtype}", "Save the adapter in F32, F16 or BF16."
        ),
    },
    "adapter_config.json": {
        "config-not-json": Cause(_DAMAGED, "{file} is not {wanted}", _UPLOAD_AGAIN),
        "config-too-long": Cause(
            FailureReason.TOO_LARGE,
            "{file} is longer than {bound} bytes, a bound of Lorapool's own",
            "Name modules by the last part of their names, such as q_proj, in place of full names.",
        ),
        "code": Cause(
            _FORMAT,
            "{file} names code of its own (auto_map), which is never run",
            "Remove auto_map, and use an architecture that transformers contains.",
        ),
        "mlx-config": Cause(_FORMAT, "{file} has the settings of mlx ({setting}), not of peft", _MLX_REMEDY),
        "other-kind": Cause(_MISFIT, "{file}: peft_type is {kind}{why}; only LoRA adapters are served", "{remedy}"),
        "setting": Cause(_MISFIT, "{file}: {setting} is set ({why}), which is not supported", "{remedy}"),
        "unknown-setting": Cause(
            _MISFIT,
            "{file}: the setting {setting} is unknown to Lorapool, so it cannot be ignored safely",
            "Train the adapter without it; if it only affects training, remove it from {file}.",
        ),
        "initialization": Cause(_MISFIT, "{file}: init_lora_weights={value} {why}", "{remedy}"),
        "trained-bias": Cause(
            _MISFIT,
            f"{{file}}: bias={{value}} trains biases of the base, {_SHARED}",
            'Train it again with bias="none".',
        ),
        "classifier": Cause(
            _MISFIT,
            "{file}: it is a classifier (task_type {task}), with an output layer of its own; only adapters that "
            "generate text are served",
            'Train it with task_type="CAUSAL_LM".',
        ),
        "no-scale": Cause(
            _MISFIT,
            "{file}: lora_alpha is {value}, so the adapter would change nothing",
            "Write the lora_alpha that it was trained with.",
        ),
        "bad-value": Cause(
            _MISFIT, "{file}: {setting}: {what}", "Save the adapter again with peft's save_pretrained()."
        ),
        "bad-expression": Cause(
            _DAMAGED,
            "{file}: {setting} holds the bad regular expression {value}: {what}",
            "Save the adapter again with peft's save_pretrained().",
        ),
        "expression": Cause(
            _MISFIT, "{file}: {setting} holds a regular expression that is not supported ({what})", _PLAIN_NAMES
        ),
        "no-targets": Cause(_MISFIT, "{file}: target_modules is empty", "Name the modules that were trained."),
    },
    "The tensors": {
        "too-large": Cause(
            FailureReason.TOO_LARGE,
            "{where} is {size} bytes, more than the {bound} allowed",
            "Save it in bf16, train with a smaller rank or fewer target modules, or raise LORAPOOL_MAX_ADAPTER_BYTES "
            "in the chart's artifacts.env.",
        ),
        "empty-tensors": Cause(
            _MISFIT,
            "tensor {tensor} is empty ({shape}): DeepSpeed ZeRO-3 or FSDP spread the weights over several processes",
            _ZERO_REMEDY,
        ),
        "several-adapters": Cause(
            _MISFIT,
            "tensor {tensor} exists twice, for two adapters in one file",
            "Save each adapter in a folder of its own: save_pretrained(path, selected_adapters=[name]).",
        ),
        "mlx-names": Cause(_MISFIT, "tensor {tensor} has a name as mlx or torchtune write it", _MLX_REMEDY),
        "dora": Cause(_MISFIT, "tensor {tensor} belongs to DoRA, which is not supported", "Train with use_dora=False."),
        "kasa": Cause(_MISFIT, "tensor {tensor} belongs to KaSA, which is not supported", "Train without kasa_config."),
        "monteclora": Cause(
            _MISFIT,
            "tensor {tensor} belongs to MonteCLoRA, which is not supported",
            "Train without monteclora_config.",
        ),
        "trained-tokens": Cause(
            _MISFIT,
            f"tensor {{tensor}} holds embeddings of trained tokens, {_SHARED}",
            "Train without trainable_token_indices.",
        ),
        "value-head": Cause(
            _MISFIT,
            "tensor {tensor} is the value head of reinforcement learning, which is only used in training",
            "Save the policy alone: model.pretrained_model.save_pretrained(path).",
        ),
        "output-head": Cause(
            _MISFIT,
            "tensor {tensor} is the output layer of a classifier or reward model; only adapters that generate text are "
            "served",
            'Train it with task_type="CAUSAL_LM".',
        ),
        "trained-module": Cause(
            _MISFIT,
            f"tensor {{tensor}} is a fully trained module of the base, {_SHARED}",
            "Train without modules_to_save.",
        ),
        "tensor-bias": Cause(
            _MISFIT,
            f"tensor {{tensor}} is a trained bias of the base, {_SHARED}",
            'Train with bias="none" and lora_bias=False.',
        ),
        "surplus-tensor": Cause(
            _MISFIT,
            "tensor {tensor} is not part of a LoRA adapter",
            "Upload what peft's save_pretrained() writes: lora_A and lora_B weights only.",
        ),
        "half-a-pair": Cause(_MISFIT, "{module} has no {part} weight", _SAME_SAVE),
        "not-matrices": Cause(
            _MISFIT, "{module} has lora_A {a} and lora_B {b}, which are not two-dimensional matrices", _SAME_SAVE
        ),
        "unequal-ranks": Cause(_MISFIT, "{module} has rank {rank} in lora_A {a} but {other} in lora_B {b}", _SAME_SAVE),
        "other-rank": Cause(_MISFIT, "{module} has rank {rank} but adapter_config.json says {other}", _SAME_SAVE),
        "rank-too-high": Cause(
            FailureReason.RANK_TOO_HIGH,
            "the adapter's rank is {rank}, the base allows {bound}",
            "Train with r <= {bound}, or raise spec.lora.maxRank of the BaseModel.",
        ),
    },
    "The tensors and the base": {
        "embedding": Cause(
            _MISFIT,
            "{module} is an embedding in a form that adapters cannot change on this base",
            "Train without {names} in target_modules.",
        ),
        "head": Cause(
            _MISFIT,
            "{module} is an output layer in a form that adapters cannot change on this base",
            "Train without {names} in target_modules.",
        ),
        "experts": Cause(
            _MISFIT,
            "{module} is an expert of a mixture, which adapters cannot change on this base",
            "Train with target_modules of the attention only, such as q_proj, k_proj, v_proj and o_proj: with "
            "gate_proj or down_proj among them, peft targets the experts too.",
        ),
        "changed-copy": Cause(
            _MISFIT,
            f"the adapter's whole {{module}} was trained: row {{row}} is not the base's, {_SHARED}",
            "Train {module} with LoRA, in target_modules and not in modules_to_save; if only the vocabulary was "
            "resized, save the adapter with save_pretrained(path, save_embedding_layers=False).",
        ),
        "wrong-base": Cause(
            FailureReason.WRONG_BASE,
            "{what}",
            "Point baseModelRef at the model that the adapter was trained on{trained_on}.",
        ),
        "unknown-modules": Cause(_MISFIT, "{what}", "Train it on this base, naming modules that it has{trained_on}."),
        "untargeted": Cause(_MISFIT, "{module} has weights but is not in target_modules", _SAME_SAVE),
        "without-weights": Cause(_MISFIT, "{module} is targeted but has no weights", _SAME_SAVE),
        "some-experts": Cause(_MISFIT, "{module} has weights for {count} of {total} experts", _SAME_SAVE),
        "changes-nothing": Cause(_MISFIT, "no module of the base is changed", _SAME_SAVE),
    },
}
"""By what shows the cause. The keys of the inner tables are unique."""

CAUSES: Mapping[str, Cause] = {name: cause for group in GROUPS.values() for name, cause in group.items()}


def refusal(cause: str, **fields: object) -> ArtifactError:
    """The error of a cause, a key of CAUSES, with the fields of its texts."""
    found = CAUSES[cause]
    return ArtifactError(found.reason, f"{found.sentence.format(**fields)}. {found.remedy.format(**fields)}")
