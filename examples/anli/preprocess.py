"""From the official files to fairseq's data folders; --help lists the options, README.md says more."""

from smart_fairseq.commands.preprocess import anli_main

if __name__ == "__main__":
    raise SystemExit(anli_main())
