"""Serves folders with vLLM and prints what it says: `python vllm_greedy.py eager|compiled FOLDER...`.

Prints a line of JSON for each folder: its name, and for each prompt the greedy tokens and their log probabilities; or the error.
"""

import json
import multiprocessing
import os
import sys

PROMPTS = [[0, 310, 7, 1999, 45, 45, 3, 800, 12, 64], [0, 17, 1203]]
NEW = 12


def serve(folder: str, mode: str) -> object:
    from vllm import LLM, SamplingParams

    try:
        # by default vLLM serves float32 in half precision
        model = LLM(folder, dtype="float32", enforce_eager=mode == "eager", max_model_len=64, max_num_seqs=2)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    greedy = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=1)
    answers = model.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], greedy)
    found = []
    for answer in (each.outputs[0] for each in answers):
        steps = zip(answer.logprobs, answer.token_ids, strict=True)
        found.append([list(answer.token_ids), [step[token].logprob for step, token in steps]])
    return found


if __name__ == "__main__":
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    import vllm  # noqa: F401 # once: each process below is a copy of this one; vLLM serves one model in a process

    mode, *folders = sys.argv[1:]
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for folder in folders:
            print("\n" + json.dumps([folder, pool.apply(serve, (folder, mode))]), flush=True)
