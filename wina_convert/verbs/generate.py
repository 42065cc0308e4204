"""`wina generate`: text from a checkpoint, as it comes, and how fast it came."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..defaults import torch_defaults
from ..errors import CheckpointError, OptionError, one_line
from ..format.checkpoint import open_checkpoint
from ..format.dtypes import check_dtype
from ..models.text import load_tokenizer
from ..runtime.kernels import cpu
from ..runtime.loader import load


@dataclass
class Generation:
    """What was generated.

    Attributes:
        text: the new text.
        tokens: how many tokens it is.
        times: seconds on the clock at which each token came.
    """

    text: str = ""
    tokens: int = 0
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
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "auto",
    write: Callable[[str], object] = lambda text: None,
) -> Generation:
    """Continue a prompt.

    Args:
        folder: a WINA checkpoint.
        prompt: the text to continue.
        max_new_tokens: at most so many tokens.
        sparsity: fraction of inputs to skip; None: the checkpoint's default.
        temperature: of sampling; 0 takes the most likely token.
        seed: of sampling.
        device: to run on.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        write: called with each piece of new text.

    Raises:
        WinaError: the checkpoint or an option cannot be used.
    """
    import torch
    from transformers import TextStreamer, set_seed

    if not 0 <= seed < 2**32:
        raise OptionError(f"seed is {seed}; give 0 to {2**32 - 1}")
    check_dtype(dtype)
    if max_new_tokens < 1 or not temperature >= 0:
        raise OptionError(
            f"max new tokens is {max_new_tokens} and temperature is {temperature}; give at least 1 and at least 0"
        )
    tokenizer = load_tokenizer(open_checkpoint(folder).folder)
    model = load(folder, sparsity=sparsity, dtype=dtype).to(device)
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    if not inputs["input_ids"].numel():
        raise OptionError("the prompt is empty and this tokenizer adds nothing to it; give a --prompt")
    if model.device.type == "cpu":
        cpu.compiled(model.dtype)  # takes seconds, the first time on a machine, which are no token's
    done = Generation()

    class Streamer(TextStreamer):
        def put(self, value: Any) -> None:
            done.times.append(time.perf_counter())
            super().put(value)  # type: ignore[no-untyped-call]

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            done.text += text
            write(text)

    set_seed(seed)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    try:
        with torch.inference_mode():
            model.generate(
                **{name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs},
                streamer=Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
                max_new_tokens=max_new_tokens,
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
