"""Predictions of checkpoints, as files for submission or by id; --help lists the options, README.md says more."""

from smart_fairseq.commands.predict import main

if __name__ == "__main__":
    raise SystemExit(main())
