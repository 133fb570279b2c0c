"""Run folders, durable writes, and safetensors files."""
