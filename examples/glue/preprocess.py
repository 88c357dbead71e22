"""From the official files to fairseq's data folders; --help lists the options, README.md says more."""

REGISTER_ON_DEMAND = True  # help and errors wait neither for torch nor for fairseq

from smart_fairseq.commands.preprocess import main  # noqa: E402

if __name__ == "__main__":
    raise SystemExit(main())
