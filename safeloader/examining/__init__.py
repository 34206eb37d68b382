"""Examines a loader before training, by running it in a child process: the doctor. Runs in: main.

::

    doctor.py ── Subject ──► child.py: a process of its own ──► looks.py: one after the other
        ▲                      │ follows it, ends it as a group    │ inheriting, sending, resuming,
        │                      │                                   │ samples, lengths, copies, speed
    Examination ◄ wording.py ◄─┴────── facts, as lines of JSON ◄───┘
    report.py

The looks find facts and know no words; the words are made of facts alone, in the calling process.
"""
