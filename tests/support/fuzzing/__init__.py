"""Damages checkpoints at random and reads them: each must be refused, or do what its files say.

    python tests/support/fuzzing --cases 20000 --seed 0    # the long run; exit code 1 if a case fails
    python tests/support/fuzzing --seed 0 --case 123       # one case again

A case applies one to three mutations to the files of a tiny checkpoint and gives the folder to `inspect_checkpoint`,
`verify_folder` and `load` with a forward pass of four tokens. In half of the cases the manifest is written anew after
the mutations, as somebody would who wants them to pass. What is right:

- a WinaError, from each of them;
- `verify_folder` accepts only bytes that are the original ones, or whose manifest was written anew;
- an inspection counts the bytes that the headers count, and can be printed;
- a loaded model gives the logits of the original. Where it does not, the mutation may have changed the function that
  the files describe: then plain transformers decides. It loads the same config without the gated block, and the same
  tensors transposed back; plain code gates its inputs by the stored thresholds and norms; the logits have to be the
  same. Where a forward pass raises, it has to raise there too.

Anything else is a failure: another exception, another result, 30 seconds, a gigabyte.
"""
