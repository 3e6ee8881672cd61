// Answers each request with its X-Request-Id, and writes a line for each when its body has been read.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
)

func main() {
	answer := func(w http.ResponseWriter, r *http.Request) {
		size, err := io.Copy(io.Discard, r.Body)
		if err != nil {
			return
		}
		identity := r.Header.Get("X-Request-Id")
		target := []rune{} // byte for byte, also what is no UTF-8
		for _, octet := range []byte(r.RequestURI) {
			target = append(target, rune(octet))
		}
		line, _ := json.Marshal([]interface{}{identity, r.Method, string(target), size})
		os.Stdout.Write(append(line, '\n'))
		w.Header().Set("Content-Length", fmt.Sprint(len(identity)))
		io.WriteString(w, identity)
	}
	fmt.Fprintln(os.Stderr, http.ListenAndServe("127.0.0.1:"+os.Args[1], http.HandlerFunc(answer)))
}
