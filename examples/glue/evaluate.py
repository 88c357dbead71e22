"""Official metrics of checkpoints or prediction files; --help lists the options, README.md says more."""

from smart_fairseq.commands.evaluate import main

if __name__ == "__main__":
    raise SystemExit(main())
