"""Conversions between GGUF files and Hugging Face folders. `python -m modules.convert` runs one in a process of its own.

`gguf_to_hf`, `hf_to_gguf` and `lora_to_gguf` are the conversions, `architectures` says which models they know, `vocabulary` is about tokenizers,
`sources` reads what is converted and `output` writes what comes of it. `gguf_model` is a GGUF model as Hugging Face has it, for the Transformers
loader too. torch and Transformers are imported by functions only; `modules.conversions` starts the process.
"""
