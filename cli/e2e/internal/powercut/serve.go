package powercut

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
)

// Serve mounts an empty disk at a folder and does what it is told, one command a line, each answered by "ok" or the error: "sync" keeps
// everything, "cut LOSS SEED" cuts the power (the processes on the disk must have ended) and mounts what is left. It returns when the
// commands end. A disk must not live in a process that works on its files: that would wait for itself.
func Serve(dir string, commands io.Reader, answers io.Writer) error {
	d := NewDisk()
	unmount, err := d.Mount(dir)
	if err != nil {
		fmt.Fprintln(answers, err)
		return err
	}
	fmt.Fprintln(answers, "ok")
	lines := bufio.NewScanner(commands)
	for lines.Scan() {
		var loss Loss
		var seed uint64
		switch _, err := fmt.Sscanf(lines.Text(), "cut %d %d", &loss, &seed); {
		case lines.Text() == "sync":
			d.Sync()
		case err != nil:
			fmt.Fprintln(answers, "unknown command", lines.Text())
			continue
		default:
			if err := unmount(); err != nil {
				fmt.Fprintln(answers, err)
				return err
			}
			d.Cut(loss, rand.New(rand.NewPCG(seed, 0)))
			if unmount, err = d.Mount(dir); err != nil {
				fmt.Fprintln(answers, err)
				return err
			}
		}
		fmt.Fprintln(answers, "ok")
	}
	if err := errors.Join(lines.Err(), unmount()); err != nil {
		return fmt.Errorf("end the disk: %w", err)
	}
	return nil
}
