// The TestService on @grpc/grpc-js, for our own client; tells on stdout what it saw.
//
// node server.js TEST.PROTO FOLDER STREAMS; FOLDER has chain, key and roots (PEM). "stop"
// on stdin: go away, but let what runs end. The end of stdin: end at once.
"use strict";

const fs = require("node:fs");
const path = require("node:path");
const grpc = require("@grpc/grpc-js");
const protobuf = require("protobufjs");

const [proto, folder, streams] = process.argv.slice(2);
const INITIAL = "x-grpc-test-echo-initial";
const TRAILING = "x-grpc-test-echo-trailing-bin";
const SERVICE = "/grpc.testing.TestService/";
const root = new protobuf.Root().loadSync(proto, { keepCase: true });
const tell = (word, text = "") => console.log(JSON.stringify([word, String(text)]));

function codec(name) {
  const type = root.lookupType(`grpc.testing.${name}`);
  return {
    read: (bytes) => type.toObject(type.decode(bytes), { defaults: true }),
    write: (value) => Buffer.from(type.encode(type.fromObject(value)).finish()),
  };
}

// Begins the answer; returns the metadata to end it with.
function begin(call) {
  const head = new grpc.Metadata();
  const trailers = new grpc.Metadata();
  for (const value of call.metadata.get(INITIAL)) {
    tell("initial", value);
    head.set(INITIAL, value);
  }
  for (const value of call.metadata.get(TRAILING)) {
    tell("trailing", value.toString("hex"));
    trailers.set(TRAILING, value);
  }
  call.sendMetadata(head);
  return trailers;
}

function refusal({ response_status: asked }) {
  if (!asked || !asked.code) return null;
  return { code: asked.code, details: asked.message };
}

const payload = (size) => ({ payload: { body: Buffer.alloc(size) } });
const wait = (us) => new Promise((done) => setTimeout(done, us / 1000));

function unary(call, callback) {
  const refused = refusal(call.request);
  if (refused) return callback(refused);
  const trailers = begin(call);
  callback(null, payload(call.request.response_size), trailers);
}

async function answer(call, asked) {
  for (const { size, interval_us } of asked.response_parameters) {
    if (call.cancelled) return;
    call.write(payload(size));
    if (interval_us) await wait(interval_us);
  }
}

async function give(call) {
  call.on("cancelled", () => tell("ended"));
  const trailers = begin(call);
  const refused = refusal(call.request);
  if (refused) return call.emit("error", refused);
  await answer(call, call.request);
  call.end(trailers);
}

async function converse(call) {
  const trailers = begin(call);
  for await (const asked of call) {
    const refused = refusal(asked);
    if (refused) return call.emit("error", refused);
    await answer(call, asked);
  }
  call.end(trailers);
}

function method(name, request, response, requestStream, responseStream) {
  const [asked, answered] = [codec(request), codec(response)];
  return {
    path: SERVICE + name,
    requestStream,
    responseStream,
    requestDeserialize: asked.read,
    requestSerialize: asked.write,
    responseDeserialize: answered.read,
    responseSerialize: answered.write,
  };
}

const asked = "StreamingOutputCallRequest";
const answered = "StreamingOutputCallResponse";
const server = new grpc.Server({
  "grpc.max_receive_message_length": -1,
  "grpc.max_concurrent_streams": Number(streams),
});
server.addService(
  {
    EmptyCall: method("EmptyCall", "Empty", "Empty", false, false),
    UnaryCall: method("UnaryCall", "SimpleRequest", "SimpleResponse", false, false),
    StreamingOutputCall: method("StreamingOutputCall", asked, answered, false, true),
    FullDuplexCall: method("FullDuplexCall", asked, answered, true, true),
  },
  {
    EmptyCall: (call, callback) => callback(null, {}),
    UnaryCall: unary,
    StreamingOutputCall: give,
    FullDuplexCall: converse,
  },
);
const read = (name) => fs.readFileSync(path.join(folder, name));
const pair = { private_key: read("key"), cert_chain: read("chain") };
const credentials = grpc.ServerCredentials.createSsl(read("roots"), [pair], true);
server.bindAsync("127.0.0.1:0", credentials, (error, port) => {
  if (error) throw error;
  tell("port", port);
});
process.stdin.on("data", () => server.tryShutdown(() => tell("stopped")));
process.stdin.on("end", () => process.exit(0));
