"""Fetches the official files, checked and resumable; --help lists the options, README.md says more."""

REGISTER_ON_DEMAND = True  # help and errors wait neither for torch nor for fairseq

from smart_fairseq.commands.download import glue_main  # noqa: E402

if __name__ == "__main__":
    raise SystemExit(glue_main())
