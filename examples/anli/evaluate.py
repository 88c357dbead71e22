"""Official metrics of checkpoints or prediction files; --help lists the options, README.md says more."""

REGISTER_ON_DEMAND = True  # help and errors wait neither for torch nor for fairseq

from smart_fairseq.commands.evaluate import main  # noqa: E402

if __name__ == "__main__":
    raise SystemExit(main())
