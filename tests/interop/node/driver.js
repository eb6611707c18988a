// Does with @grpc/grpc-js what drivers.py says on stdin, and tells on stdout what comes of it.
// Messages are bytes here: what they mean is the cases' business.
"use strict";

const fs = require("node:fs");
const grpc = require("@grpc/grpc-js");

const GZIP = 2; // of grpc's compressionAlgorithms
const bytes = (message) => message;
const calls = new Map();
let clients;

function connect({ address, name, bundle, certificate, key }) {
  if (clients) for (const one of Object.values(clients)) one.close();
  const read = (file) => fs.readFileSync(file);
  const credentials = grpc.credentials.createSsl(read(bundle), read(key), read(certificate));
  const options = { "grpc.ssl_target_name_override": name, "grpc.use_local_subchannel_pool": 1 };
  clients = {
    plain: new grpc.Client(address, credentials, options),
    compressed: new grpc.Client(address, credentials, {
      ...options,
      "grpc.default_compression_algorithm": GZIP,
    }),
  };
}

function begin({ id, shape, path, timeout_s, metadata, compressed }, request) {
  const client = compressed ? clients.compressed : clients.plain;
  const given = new grpc.Metadata();
  for (const [name, value] of metadata)
    given.add(name, name.endsWith("-bin") ? Buffer.from(value, "base64") : value);
  const options = { deadline: Date.now() + timeout_s * 1000 };
  const start = [path, bytes, bytes];
  const ended = ({ code, details }) => tell({ id, kind: "end", code, details });
  const answered = (error, message) => {
    if (!error) tell({ id, kind: "message" }, message);
  };
  const call = {
    unary: () => client.makeUnaryRequest(...start, request, given, options, answered),
    client_stream: () => client.makeClientStreamRequest(...start, given, options, answered),
    server_stream: () => client.makeServerStreamRequest(...start, request, given, options),
    bidi: () => client.makeBidiStreamRequest(...start, given, options),
  }[shape]();
  if (shape === "server_stream" || shape === "bidi") {
    // "status" may come before the last "data", "end" always comes after it.
    let status;
    call.on("data", (message) => tell({ id, kind: "message" }, message));
    call.on("error", () => {}); // "status" tells the same
    call.on("status", (told) => (status = told));
    call.on("end", () => setImmediate(() => ended(status)));
  } else {
    // The answer is given to `answered` after "status": tell of the end behind it.
    call.on("status", (status) => setImmediate(ended, status));
  }
  calls.set(id, call);
}

function act(what, body) {
  switch (what.verb) {
    case "connect": return connect(what);
    case "call": return begin(what, body);
    case "send": return calls.get(what.id).write(body);
    case "half_close": return calls.get(what.id).end();
    case "cancel": return calls.get(what.id).cancel();
  }
}

function tell(what, body = Buffer.alloc(0)) {
  const head = Buffer.from(JSON.stringify(what));
  const lengths = Buffer.alloc(8);
  lengths.writeUInt32BE(head.length, 0);
  lengths.writeUInt32BE(body.length, 4);
  process.stdout.write(Buffer.concat([lengths, head, body]));
}

// Pieces are kept as they came until a whole message is there: to join them at each
// piece would copy a large message many times.
let pieces = [], held = 0, wanted = 8;
process.stdin.on("data", (piece) => {
  pieces.push(piece);
  held += piece.length;
  while (held >= wanted) {
    const all = Buffer.concat(pieces);
    const ends = all.readUInt32BE(0) + 8;
    wanted = ends + all.readUInt32BE(4);
    pieces = [all];
    if (held < wanted) return;
    const what = JSON.parse(all.subarray(8, ends));
    act(what, all.subarray(ends, wanted));
    pieces = [all.subarray(wanted)];
    held -= wanted;
    wanted = 8;
  }
});
process.stdin.on("end", () => process.exit(0));
