"""Predictions of checkpoints, as files for submission or by id; --help lists the options, README.md says more."""

REGISTER_ON_DEMAND = True  # help and errors wait neither for torch nor for fairseq

from smart_fairseq.commands.predict import main  # noqa: E402

if __name__ == "__main__":
    raise SystemExit(main())
