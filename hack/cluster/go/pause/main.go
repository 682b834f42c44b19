// Command pause is the node's own image: without arguments the sandbox process that only waits; the tests of the
// cluster use its two other moods, so that they need no image with a shell.
//
//	pause serve :8080        answers every request with its own pod's name
//	pause fetch URL [N]      fetches URL until it answers (N tries, one a second), prints the answer
package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"
)

func main() {
	switch {
	case len(os.Args) == 1:
		wait()
	case len(os.Args) == 3 && os.Args[1] == "serve":
		serve(os.Args[2])
	case len(os.Args) >= 3 && os.Args[1] == "fetch":
		tries := 30
		if len(os.Args) == 4 {
			tries, _ = strconv.Atoi(os.Args[3])
		}
		os.Exit(fetch(os.Args[2], tries))
	default:
		fmt.Fprintln(os.Stderr, "usage: pause | pause serve ADDRESS | pause fetch URL [TRIES]")
		os.Exit(2)
	}
}

func wait() {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGINT, syscall.SIGTERM)
	children := make(chan os.Signal, 1)
	signal.Notify(children, syscall.SIGCHLD)
	for {
		select {
		case <-stop:
			return
		case <-children:
			for { // process 1 of a pod that shares its process namespace also has to bury the dead
				if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); pid <= 0 || err != nil {
					break
				}
			}
		}
	}
}

func serve(address string) {
	name, _ := os.Hostname()
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/metrics" {
			fmt.Fprintln(w, "# TYPE pause_up gauge\npause_up 1")
			return
		}
		fmt.Fprintln(w, name)
	})
	fmt.Fprintln(os.Stderr, http.ListenAndServe(address, handler))
	os.Exit(1)
}

func fetch(url string, tries int) int {
	client := http.Client{Timeout: 5 * time.Second}
	for i := 0; i < tries; i++ {
		response, err := client.Get(url)
		if err == nil {
			body, _ := io.ReadAll(response.Body)
			response.Body.Close()
			os.Stdout.Write(body)
			return 0
		}
		fmt.Fprintln(os.Stderr, err)
		time.Sleep(time.Second)
	}
	return 1
}
