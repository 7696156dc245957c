"""Conversions between GGUF files and Hugging Face folders. `python -m modules.convert` runs one in a process of its own.

`gguf_to_hf`, `hf_to_gguf` and `lora_to_gguf` are the conversions, `architectures` says which models they know, `vocabulary` is about tokenizers,
`sources` reads what is converted and `output` writes what comes of it. torch and Transformers are imported in that process only;
`modules.conversions` starts it.
"""
