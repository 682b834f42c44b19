"""The CPU decode step as one native call: traced from the loaded model, verified against it, then replayed.

`recorder` runs the model once, `trace` derives the op graph (`ops`), `verify` checks it, `step_program` replays it and
`load` does all of that at start. Where any of it fails the model's own code serves. Frozen: no further features are
added (decision 10). Kernels and their bindings belong in `kernels`.
"""
