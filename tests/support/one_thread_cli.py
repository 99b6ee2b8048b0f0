"""`optimum-cli` whose sessions have one thread each: threads that spin take the cores from other workers."""

import onnxruntime


create = onnxruntime.SessionOptions.__init__


def init(self: onnxruntime.SessionOptions) -> None:
    create(self)
    self.intra_op_num_threads = 1


onnxruntime.SessionOptions.__init__ = init

if __name__ == "__main__":
    from optimum.commands.optimum_cli import main

    main()
