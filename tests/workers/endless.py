"""Generate completions until a signal arrives."""

from conftest import build_golden

from llama.cli.program import program


def main() -> None:
    llm = build_golden(max_batch_size=1)
    print("generating", flush=True)
    while True:
        llm.generate([[1, 30]], 60, 1.0)


with program():
    main()
