"""What the fork server imports (see killing.py), so that a process forked from it is at its work at once."""

import gc

import transformers.models.llama.modeling_llama  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import wina_convert.conversion.card
import wina_convert.conversion.estimate
import wina_convert.conversion.layers
import wina_convert.conversion.pipeline
import wina_convert.conversion.proof
import wina_convert.conversion.turn_proof  # noqa: F401

get_checkpoint_conversion_mapping("llama")  # a table made at the first look: a quarter of a second
gc.collect()
gc.freeze()  # a collection in a process would copy every page that holds an object
