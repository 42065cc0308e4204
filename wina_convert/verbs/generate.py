"""`wina generate`: text from a checkpoint, as it comes, and how fast it came."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..defaults import torch_defaults
from ..errors import CheckpointError, OptionError, one_line
from ..format.checkpoint import open_checkpoint
from ..format.dtypes import dtype_name
from ..models.text import context_of, load_tokenizer
from ..runtime.kernels import cpu
from ..runtime.loader import load


@dataclass
class Generation:
    """What was generated.

    Attributes:
        text: the new text.
        tokens: how many tokens it is.
        chat: whether the prompt was put as a turn of a chat, so that the text answers it; else the text continues it.
        parameters: weights of the model.
        times: seconds on the clock at which each token came.
    """

    text: str = ""
    tokens: int = 0
    chat: bool = False
    parameters: int = 0
    times: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed, the prompt not counted; None for fewer than two tokens."""
        return (len(self.times) - 1) / (self.times[-1] - self.times[0]) if len(self.times) > 1 else None


@torch_defaults()
def generate(
    folder: str,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    sparsity: float | None = None,
    temperature: float = 0.7,
    top_p: float = 0.9,
    repetition_penalty: float = 1.1,
    raw: bool = False,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "auto",
    write: Callable[[str], object] = lambda text: None,
    echo: bool = False,
) -> Generation:
    """Continue a prompt, or answer it where the tokenizer has a chat template.

    A token is computed before the clock runs, because what is compiled is compiled then.

    Args:
        folder: a WINA checkpoint.
        prompt: the text.
        max_new_tokens: at most so many tokens; fewer where the context is full before.
        sparsity: fraction of inputs to skip; None: the checkpoint's default.
        temperature: of sampling; 0 takes the most likely token.
        top_p: sample among the most likely tokens that have this probability together.
        repetition_penalty: by which the scores of tokens that are there already are divided; 1 is none.
        raw: continue the prompt, whatever the tokenizer has.
        seed: of sampling.
        device: to run on.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        write: called with each piece of new text.
        echo: write the prompt before a text that continues it.

    Raises:
        WinaError: the checkpoint or an option cannot be used.
    """
    import torch
    from transformers import TextStreamer, set_seed

    if not 0 <= seed < 2**32:
        raise OptionError(f"seed is {seed}; give 0 to {2**32 - 1}")
    if max_new_tokens < 1:
        raise OptionError(f"max new tokens is {max_new_tokens}; give at least 1")
    if not 0 <= temperature < math.inf:
        raise OptionError(f"temperature is {temperature}; give 0 or more")
    if not 0 < top_p <= 1:
        raise OptionError(f"top-p is {top_p}; give more than 0 and at most 1")
    if not 0 < repetition_penalty < math.inf:
        raise OptionError(f"repetition penalty is {repetition_penalty}; give more than 0, such as 1.1")
    dtype = dtype_name(dtype)
    opened = open_checkpoint(folder).folder
    tokenizer = load_tokenizer(opened)
    done = Generation(chat=bool(tokenizer.chat_template) and not raw)
    inputs = _inputs(tokenizer, prompt, done.chat)
    length = inputs["input_ids"].shape[1]
    if not length:
        raise OptionError("the prompt is empty and this tokenizer adds nothing to it; give a --prompt")
    room = context_of(opened) - length
    if room < 1:
        raise OptionError(
            f"the prompt has {length} tokens and the context of {opened.name} is {length + room}; shorten it"
        )
    model = load(folder, sparsity=sparsity, dtype=dtype).to(device)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    done.parameters = model.num_parameters()

    before = [prompt] if echo and not done.chat else []  # not yet written: nothing is, if the model cannot generate

    class Streamer(TextStreamer):
        def put(self, value: Any) -> None:
            done.times.append(time.perf_counter())
            super().put(value)  # type: ignore[no-untyped-call]

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            done.text += text
            write("".join(before) + text)
            before.clear()

    set_seed(seed)
    sampling: dict[str, Any] = {"do_sample": False, "repetition_penalty": repetition_penalty}
    if temperature:
        sampling |= {"do_sample": True, "temperature": temperature, "top_p": top_p}
    try:
        with torch.inference_mode():
            if model.device.type == "cpu":
                cpu.compiled(model.dtype)  # takes seconds, the first time on a machine, which are no token's
            model(input_ids=inputs["input_ids"][:, -1:], use_cache=False)
            model.generate(
                **inputs,
                tokenizer=tokenizer,  # for the stop strings of a generation config
                streamer=Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
                max_new_tokens=min(max_new_tokens, room),
                num_beams=1,  # only one text can be streamed
                num_return_sequences=1,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                **sampling,
            )
    except OSError:
        raise
    except Exception as error:  # whatever the folder's generation_config.json leads to
        raise CheckpointError(f"{folder} cannot generate text: {one_line(error)}") from error
    del done.times[0]  # the prompt's
    done.tokens = len(done.times)
    return done


def _inputs(tokenizer: Any, prompt: str, chat: bool) -> dict[str, Any]:
    """The tokens of a prompt, [1, N], int64, and which of them count."""
    if not chat:
        encoded = tokenizer(prompt, return_tensors="pt")
        return {name: encoded[name] for name in ("input_ids", "attention_mask") if name in encoded}
    turns = [{"role": "user", "content": prompt}]
    try:
        encoded = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except Exception as error:  # whatever a template makes of it
        raise CheckpointError(f"the chat template cannot take the prompt ({one_line(error)}); pass --raw") from error
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}
