"""Fetches the official files, checked and resumable; --help lists the options, README.md says more."""

from smart_fairseq.commands.download import glue_main

if __name__ == "__main__":
    raise SystemExit(glue_main())
