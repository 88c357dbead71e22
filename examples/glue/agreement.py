"""Accuracy and cross entropy by the annotators' agreement (figure 2 of the paper); --help lists the options."""

from smart_fairseq.commands.agreement import main

if __name__ == "__main__":
    raise SystemExit(main())
