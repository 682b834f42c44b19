"""Runs llama.cpp's own converters on base and adapters: `python -m engines.convert_gguf SOURCE BASE ADAPTERS OUT`.

All conversions run in one process, because each start of a converter takes seconds. The converter would guess the kind
of tokenizer; here it is set to BPE with an arbitrary pre-tokenizer, since the benchmark sends token ids.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from common.workloads import REQUESTS, adapter_name


def main(source: Path, base: Path, adapters: Path, out: Path) -> None:
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    import conversion.base as conversion  # type: ignore[import-not-found]

    conversion.TextModel.get_vocab_base_pre = lambda _model, _tokenizer: "smollm"
    conversion.TextModel._set_vocab_sentencepiece = _no_sentencepiece
    out.mkdir(parents=True, exist_ok=True)
    _convert(source / "convert_hf_to_gguf.py", out / "base-f32.gguf", str(base))
    for number in range(REQUESTS):
        name = adapter_name(number)
        _convert(source / "convert_lora_to_gguf.py", out / f"{name}.gguf", "--base", str(base), str(adapters / name))


def _no_sentencepiece(_model: object) -> None:
    raise FileNotFoundError("this base's tokenizer is BPE")


def _convert(program: Path, target: Path, *arguments: str) -> None:
    if target.exists():
        return
    making = target.with_suffix(".making")
    sys.argv = [str(program), "--outtype", "f32", "--outfile", str(making), *arguments]
    runpy.run_path(str(program), run_name="__main__")
    making.rename(target)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:5]))
