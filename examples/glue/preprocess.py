"""From the official files to fairseq's data folders; --help lists the options, README.md says more."""

from smart_fairseq.commands.preprocess import glue_main

if __name__ == "__main__":
    raise SystemExit(glue_main())
