"""vLLM, unmodified, as the engine: for many users or many machines.

Tree, nets and allocator stay in this process; a Working Context goes to vLLM as `prompt_embeds`, so its gists are of
kind `embedding`. `VLLMEngine` drives a `vllm.LLM` in this process or in workers of its own, `VLLMServerEngine` any
server that speaks vLLM's completions (`vllm serve --enable-prompt-embeds`). `mc_runtime.served` keeps a memory over
either. docs/engines/vllm-engine.md says how to set them up and what they cannot do.
"""

from .local import VLLMEngine
from .server import VLLMServerEngine

__all__ = ["VLLMEngine", "VLLMServerEngine"]
