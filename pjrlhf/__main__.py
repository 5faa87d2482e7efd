"""`python -m pjrlhf VERB ...` is the command `pjrlhf VERB ...`."""

from pjrlhf.cli import main

if __name__ == "__main__":
    main()
