// SPDX-License-Identifier: Apache-2.0
// `NetlinkSocket`: a generic netlink socket on the event loop. Open from construction to close(), and
// not collected in between; a failure closes it too.
#include <errno.h>
#include <napi.h>

#include "../netlink/socket.h"
#include "../uio/poller.h"
#include "error.h"
#include "registry.h"

namespace tcmu {
namespace {

class NetlinkObject : public Napi::ObjectWrap<NetlinkObject>,
                      private Environment::Member,
                      private Poller::Owner {
 public:
  static void init(Napi::Env env, Napi::Object exports) {
    exports.Set("NetlinkSocket",
                DefineClass(env, "NetlinkSocket",
                            {
                                InstanceMethod<&NetlinkObject::send>("send"),
                                InstanceMethod<&NetlinkObject::join>("join"),
                                InstanceMethod<&NetlinkObject::close>("close"),
                                InstanceAccessor<&NetlinkObject::port>("port"),
                            }));
  }

  explicit NetlinkObject(const Napi::CallbackInfo& info)
      : ObjectWrap(info), Member(Environment::of(info.Env())), poller_(environment_, *this) {
    if (!info[0].IsObject()) throw Napi::TypeError::New(info.Env(), "NetlinkSocket wants options");
    const auto options = info[0].As<Napi::Object>();
    const auto callback = [&](const char* name) {
      return keepOn(info.This().As<Napi::Object>(), name, options.Get(name).As<Napi::Function>());
    };
    message_ = callback("message");
    overrun_ = callback("overrun");
    failed_ = callback("failed");
    const char* call = "";
    int error = socket_.open(options.Get("receiveBuffer").ToNumber().Int32Value(), call);
    if (error != 0) throw systemError(info.Env(), error, call);
    error = poller_.start(socket_.fd());
    if (error != 0) throw systemError(info.Env(), -error, "uv_poll_start");
    Ref();
  }

 private:
  // Datagrams taken before other handles of the loop get their turn.
  static constexpr int kDatagramsPerTurn = 64;

  void send(const Napi::CallbackInfo& info) {
    if (!info[0].IsTypedArray()) throw Napi::TypeError::New(info.Env(), "send wants a Uint8Array");
    checkOpen();
    const auto bytes = info[0].As<Napi::Uint8Array>();
    const int error = socket_.send({bytes.Data(), bytes.ByteLength()});
    if (error != 0) throw systemError(info.Env(), error, "sendto");
  }

  void join(const Napi::CallbackInfo& info) {
    checkOpen();
    const int error = socket_.join(info[0].ToNumber().Uint32Value());
    if (error != 0) throw systemError(info.Env(), error, "setsockopt");
  }

  Napi::Value port(const Napi::CallbackInfo& info) {
    return Napi::Number::New(info.Env(), socket_.port());
  }

  void close(const Napi::CallbackInfo&) { end(); }

  void checkOpen() const {
    if (!poller_.active()) throw systemError(environment_.env(), EBADF, "sendto");
  }

  void end() {
    if (!poller_.active()) return;
    poller_.stop();
    socket_.close();
    Unref();
  }

  void ready(bool) override {
    const Napi::Env env = environment_.env();
    const Napi::HandleScope scope(env);
    Ref();  // close() inside a callback must not be the end of this object
    for (int i = 0; i < kDatagramsPerTurn && poller_.active(); i++) {
      const Napi::HandleScope inner(env);
      std::vector<uint8_t> datagram;
      const auto received = socket_.receive(datagram);
      if (received == NetlinkSocket::Received::Nothing) break;
      if (received == NetlinkSocket::Received::Datagram) {
        auto bytes = Napi::Uint8Array::New(env, datagram.size());
        std::copy(datagram.begin(), datagram.end(), bytes.Data());
        const napi_value argument = bytes;
        environment_.call(message_, 1, &argument);
      } else if (received == NetlinkSocket::Received::Overrun) {
        environment_.call(overrun_, 0, nullptr);
      } else {
        const int error = errno;
        end();
        const napi_value arguments[] = {Napi::String::New(env, uv_err_name(-error)),
                                        Napi::String::New(env, uv_strerror(-error))};
        environment_.call(failed_, 2, arguments);
      }
    }
    Unref();
  }

  void stop() override {
    poller_.stop();
    socket_.close();
  }

  NetlinkSocket socket_;
  Poller poller_;
  Napi::Reference<Napi::Function> message_, overrun_, failed_;
};

const Export exportNetlink(&NetlinkObject::init);

}  // namespace
}  // namespace tcmu
